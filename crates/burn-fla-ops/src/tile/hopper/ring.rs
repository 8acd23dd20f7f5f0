//! Barriers in shared memory, and the ring of stages between a producer and its consumers.

use cubecl::prelude::*;

/// Prepares the barrier at `barrier` for `count` arrivals a phase.
#[cube]
pub fn barrier_init(barrier: u32, #[comptime] count: u32) {
    gpu_asm!("mbarrier.init.shared::cta.b64 [{b}], {count};", b = in(_) barrier + 0u32);
}

/// Makes initialised barriers visible to copies; a cube-wide synchronisation must follow.
#[cube]
pub fn barrier_fence() {
    gpu_asm!("fence.mbarrier_init.release.cluster; fence.proxy.async;");
}

/// Arrives, and lets the phase wait for `bytes` that copies will bring.
#[cube]
pub fn barrier_expect(barrier: u32, bytes: u32) {
    gpu_asm!("mbarrier.arrive.expect_tx.shared::cta.b64 _, [{b}], {n};", b = in(_) barrier + 0u32, n = in(_) bytes + 0u32);
}

/// Arrives.
#[cube]
pub fn barrier_arrive(barrier: u32) {
    gpu_asm!("mbarrier.arrive.shared::cta.b64 _, [{b}];", b = in(_) barrier + 0u32);
}

/// Waits until the phase of this parity is over. The phase before the first one counts as parity 1.
#[cube]
pub fn barrier_wait(barrier: u32, parity: u32) {
    gpu_asm!(
        "{{ .reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [{b}], {ph}; @p bra D; bra W; D: }}",
        b = in(_) barrier + 0u32, ph = in(_) parity + 0u32
    );
}

/// `stages` buffers that a producer fills and consumers release, each with a barrier for "full" and one for "empty".
///
/// Both sides count steps from 0; step `n` uses stage `n % stages`.
#[derive(CubeType, Clone, Copy)]
pub struct Ring {
    full: u32,
    empty: u32,
    #[cube(comptime)]
    stages: u32,
}

#[cube]
impl Ring {
    /// The ring whose `2 · stages` barriers stand at `address`.
    pub fn new(address: u32, #[comptime] stages: u32) -> Ring {
        Ring { full: address, empty: address + comptime!(8 * stages), stages }
    }

    /// Initialises the barriers: one unit does it, then [`barrier_fence`] and a cube-wide synchronisation.
    ///
    /// `producers` arrivals make a stage full, `consumers` arrivals make it empty.
    pub fn init(&self, #[comptime] producers: u32, #[comptime] consumers: u32) {
        let full = self.full;
        let empty = self.empty;
        #[unroll]
        for stage in 0..comptime!(self.stages) {
            barrier_init(full + comptime!(8 * stage), producers);
            barrier_init(empty + comptime!(8 * stage), consumers);
        }
    }

    /// The stage of a step.
    pub fn stage(&self, step: u32) -> u32 {
        step % comptime!(self.stages)
    }

    /// The "full" barrier of a step: a producer waits for room, then arrives here or names it to copies.
    pub fn full(&self, step: u32) -> u32 {
        self.full + (step % comptime!(self.stages)) * 8u32
    }

    /// Producer: waits until the consumers have released the stage of this step.
    pub fn wait_room(&self, step: u32) {
        let parity = (step / comptime!(self.stages)) & 1u32;
        barrier_wait(self.empty + (step % comptime!(self.stages)) * 8u32, parity ^ 1u32);
    }

    /// Consumer: waits until the stage of this step is full.
    pub fn wait_full(&self, step: u32) {
        let parity = (step / comptime!(self.stages)) & 1u32;
        barrier_wait(self.full + (step % comptime!(self.stages)) * 8u32, parity);
    }

    /// Consumer: one arrival that releases the stage of this step.
    pub fn release(&self, step: u32) {
        barrier_arrive(self.empty + (step % comptime!(self.stages)) * 8u32);
    }
}

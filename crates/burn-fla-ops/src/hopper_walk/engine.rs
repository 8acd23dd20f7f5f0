//! Which kernels walk, and their plans on a device.

use burn::backend::DispatchDevice;
use burn::tensor::Device;

use super::launch::processors;
use super::plan::{Axis, Borders, Roles, WalkPlan};
use super::{FORWARD, KEYS, QUERIES, VALUES};
use crate::mma_walk::plan::MmaPlan;

/// Which kernels walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Cores {
    /// Those of [`super::walk`].
    Hopper,
    /// Those of [`crate::mma_walk`].
    Mma,
}

/// The most channels that decay, and that stand on the other side of the state, with which [`Cores::suits`] prefers the
/// kernels of [`crate::mma_walk`].
const NARROW: [usize; 2] = [64, 128];

impl Cores {
    /// The faster kernels on a Hopper GPU, where the caller asks for none.
    ///
    /// A cube of [`super::walk`] has a processor to itself, and where at most 64 channels decay it has one warpgroup there in
    /// the walks whose outputs have these channels: a chunk is then a chain of products, sums and barriers with nothing
    /// beside it. Cubes of [`crate::mma_walk`] need less shared memory, and two to four of them share a processor. Measured on
    /// one H100, milliseconds forward and backward through the public function, in the order of batch, tokens, heads, K, V:
    ///
    /// | operator | shape | Hopper | mma |
    /// |---|---|---|---|
    /// | gla | 16 × 4096 × 16 × 64 × 64 | 2.443 | 2.063 |
    /// | rwkv6 | the same | 3.139 | 2.807 |
    /// | gsa, 64 slots | the same | 5.415 | 4.641 |
    /// | abc, 64 slots | the same | 6.474 | 5.588 |
    /// | gsa, 64 slots | 8 × 2048 × 32 × 128 × 128 | 3.159 | 2.934 |
    /// | abc, 64 slots | the same | 3.651 | 3.374 |
    /// | gla | the same | 2.142 | 2.221 |
    ///
    /// One decay for all channels leaves the other kernels ahead at all sizes (see [`crate::mma_walk`]). More than 128 channels
    /// on the other side were not measured.
    pub(crate) fn suits(axis: Axis, keys: usize, values: usize) -> Self {
        let (decaying, others) = if axis == Axis::Value { (values, keys) } else { (keys, values) };
        let narrow = decaying <= NARROW[0] && others <= NARROW[1];
        if axis.by_channel() && narrow { Self::Mma } else { Self::Hopper }
    }

    /// Those of two passes that are one operator. Where they differ, the device is one that both kernels run on.
    pub(crate) fn of_both(self, other: Self) -> Self {
        if self == other { self } else { Self::Hopper }
    }
}

/// The kernels that walk, and what they need to know of the device.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Engine {
    pub(crate) cores: Cores,
    pub(crate) processors: usize,
    /// Bytes of shared memory that a cube may use.
    shared: usize,
}

/// Bytes of shared memory that a cube may use.
pub(crate) fn shared_memory(device: &Device) -> usize {
    match device.clone().inner().as_dispatch() {
        DispatchDevice::Cube(device) => device.client().properties().hardware.max_shared_memory_size,
        _ => 0,
    }
}

impl Engine {
    pub(crate) fn on(device: &Device, cores: Cores) -> Self {
        Self { cores, processors: processors(device), shared: shared_memory(device) }
    }

    pub(crate) fn plan(&self, roles: Roles, keys: usize, values: usize, axis: Axis, exclusive: bool) -> WalkPlan {
        let hopper = || WalkPlan::new(roles, keys, values, axis, exclusive);
        match self.cores {
            Cores::Hopper => hopper().expect("the engine was chosen by the size"),
            Cores::Mma => self.mma_plan(roles, keys, values, axis, exclusive).walk,
        }
    }

    /// Whether every walk, forward and backward, has a plan for the kernels of [`crate::mma_walk`].
    pub(crate) fn takes(&self, keys: usize, values: usize, axis: Axis, exclusive: bool) -> bool {
        let gate = |roles| Roles { borders: Borders::Write, ..roles };
        let [reads, writes] = if axis == Axis::Value { [FORWARD, VALUES] } else { [QUERIES, KEYS] };
        let walks = [FORWARD, VALUES, QUERIES, KEYS, gate(reads), gate(writes)];
        walks.into_iter().all(|roles| MmaPlan::new(roles, keys, values, axis, exclusive, self.shared).is_some())
    }

    pub(crate) fn mma_plan(&self, roles: Roles, keys: usize, values: usize, axis: Axis, exclusive: bool) -> MmaPlan {
        let plan = MmaPlan::new(roles, keys, values, axis, exclusive, self.shared);
        plan.expect("the engine was chosen by the size")
    }

    /// Groups of the outer channels, each of which has its own sums of products with the outputs, or their own scales.
    pub(crate) fn channel_groups(&self, plan: &WalkPlan) -> usize {
        match self.cores {
            Cores::Hopper => plan.outer_panels(),
            Cores::Mma => {
                let (keys, values) =
                    if plan.roles.outer_is_value { (plan.inner, plan.outer) } else { (plan.outer, plan.inner) };
                self.mma_plan(plan.roles, keys, values, plan.axis, plan.exclusive).channel_groups()
            }
        }
    }

    /// Cubes that run at once.
    pub(crate) fn cubes(&self, roles: Roles, keys: usize, values: usize, axis: Axis, exclusive: bool) -> usize {
        match self.cores {
            Cores::Hopper => self.processors,
            Cores::Mma => self.processors * self.mma_plan(roles, keys, values, axis, exclusive).cubes(self.shared),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_decaying_channels_are_walked_by_single_warps() {
        assert_eq!(Cores::suits(Axis::Key, 64, 64), Cores::Mma);
        assert_eq!(Cores::suits(Axis::Value, 128, 64), Cores::Mma);
        for (axis, keys, values) in [(Axis::Key, 80, 64), (Axis::Key, 64, 144), (Axis::Token, 64, 64)] {
            assert_eq!(Cores::suits(axis, keys, values), Cores::Hopper);
        }
    }
}

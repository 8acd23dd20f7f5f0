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

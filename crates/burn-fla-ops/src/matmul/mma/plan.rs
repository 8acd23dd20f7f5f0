//! How a product is cut for the kernel of [`super::kernel`].

use crate::matmul::hopper::plan::{Plan, ROWS};

/// A plan and the stages of its cubes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(in crate::matmul) struct MmaPlan {
    /// Its `columns` are also the units of a cube, one warp for 64 × 64 results.
    pub(super) plan: Plan,
    pub(super) stages: usize,
}

impl MmaPlan {
    pub(super) fn new(plan: Plan, shared: usize) -> Self {
        let cubes = cubes(&plan, shared);
        let stages = ((shared + 1024) / cubes - 1024) / plan.stage_bytes();
        Self { plan, stages: stages.clamp(2, 4) }
    }

    /// Units of a cube.
    pub(super) fn units(&self) -> usize {
        self.plan.columns
    }
}

/// Cubes that a processor runs at once: two of 128 columns have registers, where shared memory holds three stages of each.
fn cubes(plan: &Plan, shared: usize) -> usize {
    let two = plan.columns == 128 && (shared + 1024) / 2 >= 3 * plan.stage_bytes() + 1024;
    if two { 2 } else { 1 }
}

/// The plan that takes the least time by a count of clocks, as [`Plan::choose`] does for the other kernel.
pub(in crate::matmul) fn choose(
    sizes: &[[usize; 2]],
    steps: usize,
    rows: [bool; 2],
    f32_out: bool,
    processors: usize,
    shared: usize,
) -> Plan {
    let mut best: Option<(f64, Plan)> = None;
    for columns in [256, 128] {
        for splits in [1, 2, 3, 4, 6, 8, 12, 16] {
            if splits > steps {
                continue;
            }
            let plan = Plan::cut(sizes.len(), rows, columns, splits, f32_out);
            let tiles: usize = sizes.iter().map(|[m, n]| m.div_ceil(ROWS) * n.div_ceil(columns)).sum();
            // Cubes of one processor share its tensor cores.
            let cubes = cubes(&plan, shared);
            let rounds = (tiles * splits).div_ceil(processors * cubes) * cubes;
            let clocks = plan.clocks(sizes, steps, rounds, RATE);
            if best.is_none_or(|(least, _)| clocks < least) {
                best = Some((clocks, plan));
            }
        }
    }
    best.expect("an item is one step at least").1
}

/// Multiply-adds of one processor's tensor cores in a clock.
const RATE: f64 = 1024.0 * 0.9;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::matmul::hopper::plan::DEPTH;

    /// Shared memory that a cube may use on GPUs of compute capability 8.0, 9.0, and 8.6, 8.9 or 12.0.
    const LIMITS: [usize; 3] = [163 * 1024, 227 * 1024, 99 * 1024];

    #[test]
    fn stages_fit_and_no_part_is_empty() {
        for shared in LIMITS {
            for [m, n, k] in [[1, 8, 8], [64, 64, 72], [8192, 1024, 1024], [1024, 1024, 65_536], [16_384, 32_000, 1024]]
            {
                let steps = usize::div_ceil(k, DEPTH);
                let plan = choose(&[[m, n]], steps, [false, false], false, 132, shared);
                let mma = MmaPlan::new(plan, shared);
                assert!(mma.stages >= 2 && mma.stages * plan.stage_bytes() <= shared, "{mma:?}");
                assert!(plan.splits <= steps);
            }
        }
    }
}

//! The tensors that the launches hand to each other.

use crate::bridge::CubeTensor;

/// The inputs as the kernels read them.
pub(crate) struct Inputs {
    /// q, k, a, b; k again where there is no a or b.
    pub(crate) qkab: [CubeTensor; 4],
    pub(crate) v: CubeTensor,
    pub(crate) g: CubeTensor,
    /// Writing strengths, or anything.
    pub(crate) strengths: CubeTensor,
    pub(super) initial: Option<CubeTensor>,
    pub(crate) table: CubeTensor,
}

/// What [`super::prepare`] leaves.
pub(crate) struct Operands {
    pub(crate) first: CubeTensor,
    pub(crate) second: CubeTensor,
    pub(super) out: CubeTensor,
    pub(super) into: CubeTensor,
    pub(crate) scores: CubeTensor,
    pub(crate) decays: CubeTensor,
    /// N, A_qb and H, for backward.
    pub(crate) extras: [CubeTensor; 3],
}

impl Operands {
    /// What a walk reads the state with, what that is written with, what outputs read with, and what values are written with.
    pub(crate) fn for_walk(&self, against_time: bool) -> [&CubeTensor; 4] {
        match against_time {
            false => [&self.first, &self.second, &self.out, &self.into],
            true => [&self.second, &self.first, &self.into, &self.out],
        }
    }
}

/// Where the gradients of q, k, a and b, of the decays, and of the writing strengths go.
pub(crate) struct Gradients {
    pub(crate) dq: CubeTensor,
    pub(crate) dk: CubeTensor,
    pub(crate) da: CubeTensor,
    pub(crate) db: CubeTensor,
    pub(crate) dg: CubeTensor,
    pub(crate) dbeta: CubeTensor,
}

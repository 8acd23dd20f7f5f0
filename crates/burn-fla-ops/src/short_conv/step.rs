//! One token of a convolution that goes on from its history, as generation does.

use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{UNITS, address, grid, sigmoid, unused};

/// One token of each sequence: `x` `[N, D]`, `history` and `cache` `[N, D, W]`. One unit a channel.
#[cube(launch, address_type = "dynamic")]
fn step_kernel<E: Float>(
    x: &Tensor<E>,
    weight: &Tensor<f32>,
    bias: &Tensor<f32>,
    history: &Tensor<E>,
    y: &mut Tensor<E>,
    cache: &mut Tensor<E>,
    count: u32,
    #[comptime] dim: usize,
    #[comptime] taps: usize,
    #[comptime] silu: bool,
    #[comptime] has_bias: bool,
    #[define(E)] _element: ElemType,
) {
    let at = ABSOLUTE_POS;
    if at < count as usize {
        let channel = at % dim;
        let current = x[at];
        let mut z = f32::cast_from(current) * weight[channel * taps + comptime!(taps - 1)];
        #[unroll]
        for j in 1..taps {
            let value = history[at * taps + j];
            cache[at * taps + comptime!(j - 1)] = value;
            z += f32::cast_from(value) * weight[channel * taps + comptime!(j - 1)];
        }
        cache[at * taps + comptime!(taps - 1)] = current;
        if comptime!(has_bias) {
            z += bias[channel];
        }
        if comptime!(silu) {
            z *= sigmoid::<Const<1>>(Vector::new(z), false).extract(0usize);
        }
        y[at] = E::cast_from(z);
    }
}

/// One token of each sequence, without gradients. Inputs: `x` `[N, D]`, `weight` `[D, W]`, the history `[N, D, W]`, with
/// `bias` also `[D]`. Outputs: `y` as `x`, the cache as the history.
#[derive(Clone, Debug)]
pub(super) struct Step {
    pub(super) silu: bool,
    pub(super) bias: bool,
}

impl Operator for Step {
    fn name(&self) -> &'static str {
        "short_conv_step"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone(), inputs[2].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let mut inputs = inputs.into_iter().map(contiguous);
        let mut next = || inputs.next().expect("three inputs");
        let (x, weight, history) = (next(), next(), next());
        let bias = inputs.next().unwrap_or_else(|| unused(&x, 1));
        let [sequences, dim] = x.meta.shape().dims();
        let [_, taps] = weight.meta.shape().dims();
        let y = alloc(&x, [sequences, dim], x.dtype);
        let cache = alloc(&x, [sequences, dim, taps], x.dtype);
        step_kernel::launch(
            &x.client.clone(),
            grid((sequences * dim).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x, &cache]),
            x.clone().into_tensor_arg(),
            weight.into_tensor_arg(),
            bias.into_tensor_arg(),
            history.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            cache.clone().into_tensor_arg(),
            (sequences * dim) as u32,
            dim,
            taps,
            self.silu,
            self.bias,
            storage(x.dtype),
        );
        vec![y, cache]
    }

    fn backward(
        &self,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        unreachable!("the step takes untracked tensors only")
    }
}

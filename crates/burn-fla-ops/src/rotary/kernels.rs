//! The rotary embedding on devices with kernels: backward is forward with the angles turned round.

use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{MAX_CUBES, UNITS, address, grid, vector_size};

#[cube(launch, address_type = "dynamic")]
fn rotate_kernel<E: Float, N: Size>(
    x: &Tensor<Vector<E, N>>,
    cos: &Tensor<Vector<f32, N>>,
    sin: &Tensor<Vector<f32, N>>,
    positions: &Tensor<i32>,
    y: &mut Tensor<Vector<E, N>>,
    rows: u32,
    heads: u32,
    last: u32,
    sign: f32,
    #[comptime] half: usize,
    #[define(E)] _element: ElemType,
) {
    let total = rows as usize * comptime!(half);
    let mut at = ABSOLUTE_POS;
    while at < total {
        let row = at / comptime!(half);
        let column = at % comptime!(half);
        let position = positions[row / heads as usize];
        let position = u32::cast_from(clamp(position, 0i32, last as i32)) as usize;
        let c = cos[position * comptime!(half) + column];
        let s = sin[position * comptime!(half) + column] * Vector::new(sign);
        let first = row * comptime!(2 * half) + column;
        let second = first + comptime!(half);
        let x1 = Vector::<f32, N>::cast_from(x[first]);
        let x2 = Vector::<f32, N>::cast_from(x[second]);
        y[first] = Vector::cast_from(x1 * c - x2 * s);
        y[second] = Vector::cast_from(x1 * s + x2 * c);
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

/// Inputs: `x` `[B·T, H, D]`, `cos` and `sin` f32 `[P, D/2]`; positions i32 `[B·T]`. Output as `x`.
#[derive(Clone, Debug)]
pub(super) struct Rotary;

impl Rotary {
    fn rotate(x: CubeTensor, cos: CubeTensor, sin: CubeTensor, positions: CubeTensor, sign: f32) -> CubeTensor {
        let (x, cos, sin, positions) = (contiguous(x), contiguous(cos), contiguous(sin), contiguous(positions));
        let [tokens, heads, dim] = x.meta.shape().dims();
        let [table, _] = cos.meta.shape().dims();
        let vector = vector_size(dim / 2);
        let half = dim / 2 / vector;
        let rows = tokens * heads;
        let y = alloc(&x, [tokens, heads, dim], x.dtype);
        rotate_kernel::launch(
            &x.client.clone(),
            grid((rows * half).div_ceil(UNITS).min(MAX_CUBES)),
            CubeDim::new_1d(UNITS as u32),
            address(&[&x]),
            vector,
            x.clone().into_tensor_arg(),
            cos.into_tensor_arg(),
            sin.into_tensor_arg(),
            positions.into_tensor_arg(),
            y.clone().into_tensor_arg(),
            rows as u32,
            heads as u32,
            (table - 1) as u32,
            sign,
            half,
            storage(x.dtype),
        );
        y
    }
}

impl Operator for Rotary {
    fn name(&self) -> &'static str {
        "rotary"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, ints: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let [x, cos, sin] = inputs.try_into().expect("three inputs");
        let [positions] = ints.try_into().expect("positions");
        vec![Self::rotate(x, cos, sin, positions, 1.0)]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        ints: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [_, cos, sin] = inputs.try_into().expect("three inputs");
        let [positions] = ints.try_into().expect("positions");
        let dy = grads.into_iter().flatten().next().expect("the gradient of the output");
        vec![Some(Self::rotate(dy, cos, sin, positions, -1.0)), None, None]
    }
}

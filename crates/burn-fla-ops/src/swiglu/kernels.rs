//! SwiGLU on devices with kernels: one pass forward, one backward, nothing saved besides the inputs.

use cubecl::prelude::*;

use crate::bridge::{CubeTensor, Operator, TensorSpec, alloc, contiguous, storage};
use crate::rows::{MAX_CUBES, UNITS, address, grid, sigmoid, vector_size};

#[cube(launch, address_type = "dynamic")]
fn forward_kernel<E: Float, N: Size>(
    gate: &Tensor<Vector<E, N>>,
    up: &Tensor<Vector<E, N>>,
    y: &mut Tensor<Vector<E, N>>,
    #[define(E)] _element: ElemType,
) {
    let mut at = ABSOLUTE_POS;
    while at < y.len() {
        let g = Vector::<f32, N>::cast_from(gate[at]);
        let u = Vector::<f32, N>::cast_from(up[at]);
        y[at] = Vector::cast_from(g * sigmoid::<N>(g, false) * u);
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

#[cube(launch, address_type = "dynamic")]
fn backward_kernel<E: Float, N: Size>(
    gate: &Tensor<Vector<E, N>>,
    up: &Tensor<Vector<E, N>>,
    dy: &Tensor<Vector<E, N>>,
    dgate: &mut Tensor<Vector<E, N>>,
    dup: &mut Tensor<Vector<E, N>>,
    y: &mut Tensor<Vector<E, N>>,
    #[comptime] with_output: bool,
    #[define(E)] _element: ElemType,
) {
    let one = Vector::<f32, N>::new(1.0f32);
    let mut at = ABSOLUTE_POS;
    while at < dgate.len() {
        let g = Vector::<f32, N>::cast_from(gate[at]);
        let u = Vector::<f32, N>::cast_from(up[at]);
        let grad = Vector::<f32, N>::cast_from(dy[at]);
        let s = sigmoid::<N>(g, false);
        dgate[at] = Vector::cast_from(grad * u * s * (one + g * (one - s)));
        dup[at] = Vector::cast_from(grad * g * s);
        if comptime!(with_output) {
            y[at] = Vector::cast_from(g * s * u);
        }
        at += CUBE_COUNT_X as usize * comptime!(UNITS);
    }
}

/// `silu(gate) ∘ up`, of contiguous tensors of any shape.
pub(super) fn forward(gate: CubeTensor, up: CubeTensor) -> CubeTensor {
    let size = gate.meta.shape().num_elements();
    let vector = vector_size(size);
    let y = like(&gate);
    forward_kernel::launch(
        &gate.client.clone(),
        grid((size / vector).div_ceil(UNITS).min(MAX_CUBES)),
        CubeDim::new_1d(UNITS as u32),
        address(&[&gate]),
        vector,
        gate.clone().into_tensor_arg(),
        up.into_tensor_arg(),
        y.clone().into_tensor_arg(),
        storage(gate.dtype),
    );
    y
}

/// The gradients of gate and up, and, where asked for, the output once more.
pub(super) fn backward(
    gate: CubeTensor,
    up: CubeTensor,
    dy: CubeTensor,
    with_output: bool,
) -> (CubeTensor, CubeTensor, Option<CubeTensor>) {
    let size = gate.meta.shape().num_elements();
    let vector = vector_size(size);
    let (dgate, dup) = (like(&gate), like(&gate));
    // Where it is not written, a small buffer stands for it.
    let y = if with_output { like(&gate) } else { alloc(&gate, [vector], gate.dtype) };
    backward_kernel::launch(
        &gate.client.clone(),
        grid((size / vector).div_ceil(UNITS).min(MAX_CUBES)),
        CubeDim::new_1d(UNITS as u32),
        address(&[&gate]),
        vector,
        gate.clone().into_tensor_arg(),
        up.into_tensor_arg(),
        dy.into_tensor_arg(),
        dgate.clone().into_tensor_arg(),
        dup.clone().into_tensor_arg(),
        y.clone().into_tensor_arg(),
        with_output,
        storage(gate.dtype),
    );
    (dgate, dup, with_output.then_some(y))
}

fn like(x: &CubeTensor) -> CubeTensor {
    let shape = x.meta.shape().clone();
    let flat = alloc(x, [shape.num_elements()], x.dtype);
    CubeTensor::new_contiguous(flat.client, flat.device, shape, flat.handle, flat.dtype)
}

/// Inputs: `gate` and `up`, `[n]`. Output: `y` `[n]`.
#[derive(Clone, Debug)]
pub(super) struct SwiGlu;

impl Operator for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        vec![inputs[0].clone()]
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _: Vec<CubeTensor>, _: bool) -> Vec<CubeTensor> {
        let [gate, up] = inputs.try_into().expect("two inputs");
        vec![forward(contiguous(gate), contiguous(up))]
    }

    fn backward(
        &self,
        inputs: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        _: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        _: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        let [gate, up] = inputs.try_into().expect("two inputs");
        let dy = contiguous(grads.into_iter().flatten().next().expect("the gradient of the output"));
        let (dgate, dup, _) = backward(contiguous(gate), contiguous(up), dy, false);
        vec![Some(dgate), Some(dup)]
    }
}

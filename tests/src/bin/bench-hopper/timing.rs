//! How long calls take, and what the device's copy moves meanwhile.

use std::time::Instant;

use burn::tensor::{DType, Device, Distribution, Tensor};
use burn_fla_ops::bridge::{CubeTensor, Operator, TensorSpec, apply};

/// The median of seconds that one call takes: groups of calls that last about 30 ms, each group with one wait at its end.
pub(crate) fn median(device: &Device, mut call: impl FnMut()) -> f64 {
    let mut group = |count: usize| {
        let start = Instant::now();
        (0..count).for_each(|_| call());
        device.sync().expect("the device answers");
        start.elapsed().as_secs_f64() / count as f64
    };
    group(2);
    let first = group(2);
    let count = (0.03 / first).clamp(1.0, 200.0) as usize;
    // What takes longer varies less.
    let groups = if first > 0.1 { 3 } else { 7 };
    let mut times: Vec<f64> = (0..groups).map(|_| group(count)).collect();
    times.sort_by(f64::total_cmp);
    times[groups / 2]
}

/// A copy by a kernel. An operation of Burn whose result nobody reads would not run.
#[derive(Debug)]
struct Copied;

impl Operator for Copied {
    fn name(&self) -> &'static str {
        "copied"
    }

    fn outputs(&self, inputs: &[TensorSpec]) -> Vec<TensorSpec> {
        inputs.to_vec()
    }

    fn forward(&self, inputs: Vec<CubeTensor>, _ints: Vec<CubeTensor>, _save: bool) -> Vec<CubeTensor> {
        vec![inputs[0].copy()]
    }

    fn backward(
        &self,
        _inputs: Vec<CubeTensor>,
        _ints: Vec<CubeTensor>,
        _saved: Vec<CubeTensor>,
        grads: Vec<Option<CubeTensor>>,
        _wanted: &[bool],
    ) -> Vec<Option<CubeTensor>> {
        grads
    }
}

/// Bytes a second that are read and written where 256 MiB are read and 256 MiB written.
pub(crate) fn copy_speed(device: &Device) -> f64 {
    const SIZE: usize = 1 << 27;
    let normal = Distribution::Normal(0.0, 1.0);
    let x: Tensor<2> = Tensor::random([SIZE / 4096, 4096], normal, (device, DType::BF16));
    let seconds = median(device, || drop(apply(Copied, vec![x.clone().into_dispatch()], Vec::new())));
    (4 * SIZE) as f64 / seconds
}

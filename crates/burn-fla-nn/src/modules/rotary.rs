//! Rotary position embedding.

use burn::tensor::{Device, Int, Tensor, TensorData};
use burn_fla_ops::{self as ops, Engine};

use crate::NnError;
use crate::per_device::PerDevice;

/// The cosines and sines of every position up to a length, f32, `[positions, width / 2]`.
#[derive(Clone, Debug)]
pub struct RotaryTables {
    /// cos(p · θ^(−2i/width))
    pub cos: Tensor<2>,
    /// sin(p · θ^(−2i/width))
    pub sin: Tensor<2>,
}

impl RotaryTables {
    /// Positions 0 to `positions` − 1 on `device`.
    ///
    /// Made on the host: some devices' sine is off by 5e-4 for large arguments, which WGSL allows. The angle is an f32
    /// product of the position and an f32 frequency, as the models were trained with.
    pub fn new(positions: usize, width: usize, base: f64, device: &Device) -> Self {
        let frequencies: Vec<f32> =
            (0..width / 2).map(|i| (1.0 / base.powf((2 * i) as f64 / width as f64)) as f32).collect();
        let angles = || (0..positions).flat_map(|p| frequencies.iter().map(move |f| f64::from(p as f32 * f)));
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, [positions, width / 2]), device);
        Self {
            cos: table(angles().map(|a| a.cos() as f32).collect()),
            sin: table(angles().map(|a| a.sin() as f32).collect()),
        }
    }
}

/// Rotates the two halves of each head against each other (Su et al. 2021, half-split form):
/// (x₁, x₂) → (x₁ cos − x₂ sin, x₁ sin + x₂ cos), angle p · θ^(−2i/width).
///
/// Holds no parameter; the tables are made once on each device and grow with the longest position seen.
#[derive(Clone, Debug)]
pub struct Rotary {
    width: usize,
    base: f64,
    tables: PerDevice<RotaryTables>,
}

impl Rotary {
    /// For heads of `width` features; `base` is θ.
    ///
    /// # Errors
    /// An odd width.
    pub fn new(width: usize, base: f64) -> Result<Self, NnError> {
        if !width.is_multiple_of(2) {
            return Err(NnError::argument(
                "width",
                format!("rotary embedding needs heads of an even width, not {width}"),
            ));
        }
        Ok(Self { width, base, tables: PerDevice::default() })
    }

    /// # Shapes
    /// - `x` `[batch, tokens, heads, width]`
    /// - `positions` `[batch, tokens]`, each below `end`
    ///
    /// # Errors
    /// Shapes that do not fit.
    pub fn forward(
        &self,
        x: Tensor<4>,
        positions: Tensor<2, Int>,
        end: usize,
        engine: Engine,
    ) -> Result<Tensor<4>, NnError> {
        let tables = self.tables.get(
            &x.device(),
            |tables| tables.cos.dims()[0] >= end,
            // Doubling: a long generation makes a table a handful of times.
            |device| RotaryTables::new(end.next_power_of_two().max(64), self.width, self.base, device),
        );
        Ok(ops::rotary(x, tables.cos, tables.sin, positions, engine)?)
    }
}

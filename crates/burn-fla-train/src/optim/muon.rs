//! Muon: momentum whose matrices are made orthogonal before they are applied.

use burn::module::Module;
use burn::tensor::{DType, Device, Tensor};

use super::{AdamW, ParamEntry, ParamRule, ParamRules, ParamTable, StepReport};
use crate::TrainError;
use crate::recipe::{OptimizerSection, TrainingSection};

/// Muon for the matrices of a model's layers, AdamW for every other parameter (embedding, output map, norms, biases,
/// convolutions, decays).
///
/// With g `[m, n]` the gradient of a matrix after the clip:
///
/// M ← μ M + g,  U = g + μ M,  O = NS(U / ‖U‖),  p ← p (1 − η λ) − 0.2 η √max(m, n) · O,
///
/// where NS is a few iterations X ← a X + (b X Xᵀ + c (X Xᵀ)²) X with (a, b, c) = (3.4445, −4.7750, 2.0315), which bring
/// the singular values of U near 1 (Jordan et al. 2024, <https://kellerjordan.github.io/posts/muon/>). The factor gives
/// O the root mean square that an update of AdamW has, so that both share one learning rate and decay (Liu et al. 2025,
/// [arXiv:2502.16982](https://arxiv.org/abs/2502.16982)).
///
/// The clip is by the norm over all parameters; where that is not finite (and `skip_nan_inf` is set) nothing changes.
/// Both are decided on the device.
#[derive(Clone, Debug)]
pub struct Muon {
    momentum: f64,
    iterations: usize,
    max_norm: f64,
    skip: bool,
    table: ParamTable,
    /// Of each parameter of `table`: whether it is a matrix of a layer, and its place among its like.
    places: Vec<Place>,
    matrices: ParamTable,
    rules: Vec<ParamRule>,
    moments: Vec<Tensor<1>>,
    others: AdamW,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Matrix(usize),
    Other(usize),
}

impl Muon {
    /// An optimiser with zero moments on `device`, which must have no autodiff.
    ///
    /// # Errors
    /// A group whose pattern is no regular expression.
    pub fn new(
        table: ParamTable,
        optimizer: &OptimizerSection,
        training: &TrainingSection,
        device: &Device,
    ) -> Result<Muon, TrainError> {
        let rules = ParamRules::new(optimizer)?;
        let (mut matrices, mut others, mut places) = (Vec::new(), Vec::new(), Vec::new());
        for entry in table.entries() {
            let (list, place): (&mut Vec<ParamEntry>, fn(usize) -> Place) = match is_matrix(entry) {
                true => (&mut matrices, Place::Matrix),
                false => (&mut others, Place::Other),
            };
            places.push(place(list.len()));
            list.push(entry.clone());
        }
        // The clip is over all parameters, so AdamW has none of its own.
        let unclipped = TrainingSection { max_norm: 0.0, ..training.clone() };
        Ok(Muon {
            momentum: optimizer.momentum.unwrap_or(0.95),
            iterations: optimizer.ns_steps.unwrap_or(5),
            max_norm: training.max_norm,
            skip: training.skip_nan_inf,
            rules: matrices.iter().map(|entry| rules.of(&entry.name, entry.shape.len())).collect(),
            moments: matrices.iter().map(|entry| Tensor::zeros([entry.len()], device)).collect(),
            others: AdamW::new(ParamTable::new(others), optimizer, &unclipped, device)?,
            matrices: ParamTable::new(matrices),
            table,
            places,
        })
    }

    /// All parameters.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// The parameters that Muon updates, and their moments, flattened, in the same order.
    pub fn moments(&self) -> (&ParamTable, &[Tensor<1>]) {
        (&self.matrices, &self.moments)
    }

    /// Continues from these moments, which must have the sizes of [`Muon::moments`].
    pub fn set_moments(&mut self, moments: Vec<Tensor<1>>) {
        self.moments = moments;
    }

    /// AdamW of the other parameters, which also counts the steps that were skipped.
    pub fn others(&self) -> &AdamW {
        &self.others
    }

    /// The same, to be given a state.
    pub fn others_mut(&mut self) -> &mut AdamW {
        &mut self.others
    }

    /// One update of `model` (without autodiff) with gradients in the table's order and learning rate `lr`.
    ///
    /// # Errors
    /// Gradients of other sizes or on another device than the parameters.
    pub fn step<M: Module>(
        &mut self,
        model: M,
        grads: Vec<Option<Tensor<1>>>,
        lr: f64,
    ) -> Result<(M, StepReport), TrainError> {
        let device = self.others.state().counters.device();
        let norm = norm(&grads, &device);
        let finite = norm.clone().is_finite();
        let bad = finite.clone().bool_not();
        let mut factor = Tensor::<1>::ones([1], &device);
        if self.max_norm > 0.0 {
            factor = ((norm.clone() + 1e-6).recip() * self.max_norm).clamp_max(1.0);
        }
        // AdamW sees one norm of its own parameters: where the gradient of another is not finite, this makes that one so.
        let told = factor.clone().mask_fill(bad.clone(), f64::NAN);
        let mut matrices: Vec<Option<Tensor<1>>> = vec![None; self.moments.len()];
        let mut others: Vec<Option<Tensor<1>>> = vec![None; self.others.table().entries().len()];
        for (place, grad) in self.places.iter().zip(grads) {
            match place {
                Place::Matrix(at) => matrices[*at] = grad.map(|grad| grad * factor.clone()),
                Place::Other(at) => others[*at] = grad.map(|grad| grad * told.clone()),
            }
        }
        let (model, report) = self.others.step(model, others, lr)?;
        let table = self.matrices.clone();
        let skip = self.skip.then_some(bad);
        let model = table.map(model, |mut values| {
            for (at, grad) in matrices.into_iter().enumerate() {
                let (Some(grad), Some(value)) = (grad, values[at].take()) else { continue };
                let shape = &table.entries()[at].shape;
                let (value, moment) = self.update(at, [shape[0], shape[1]], value, grad, lr, skip.as_ref());
                values[at] = Some(value);
                self.moments[at] = moment;
            }
            Ok(values)
        })?;
        Ok((model, report.with_norm(norm)))
    }

    /// The new value and moment of one matrix, flat.
    fn update(
        &self,
        at: usize,
        [rows, columns]: [usize; 2],
        value: Tensor<1>,
        grad: Tensor<1>,
        lr: f64,
        skip: Option<&Tensor<1, burn::tensor::Bool>>,
    ) -> (Tensor<1>, Tensor<1>) {
        let rule = self.rules[at];
        let old = self.moments[at].clone();
        let moment = old.clone() * self.momentum + grad.clone();
        let update = (grad + moment.clone() * self.momentum).reshape([rows, columns]);
        let rate = lr * rule.lr_scale;
        let scale = 0.2 * rate * (rows.max(columns) as f64).sqrt();
        let change = orthogonal(update, self.iterations).reshape([rows * columns]) * scale;
        let next = value.clone() * (1.0 - rate * rule.weight_decay) - change;
        match skip {
            None => (next, moment),
            // A product with zero would not undo NaN, so a skip selects.
            Some(bad) => {
                let bad = bad.clone().expand([rows * columns]);
                (next.mask_where(bad.clone(), value), moment.mask_where(bad, old))
            }
        }
    }
}

/// Whether Muon updates a parameter: a linear map of a layer.
pub(crate) fn is_matrix(entry: &ParamEntry) -> bool {
    entry.shape.len() == 2 && entry.name.contains(".layers.") && entry.name.ends_with(".weight")
}

/// `x` `[m, n]` with its singular values brought near 1.
fn orthogonal(x: Tensor<2>, iterations: usize) -> Tensor<2> {
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let [rows, columns] = x.dims();
    let x = x.cast(DType::F32);
    let length = (x.clone() * x.clone()).sum().sqrt() + 1e-7;
    // The product of x with its transpose is taken on the shorter side.
    let tall = rows > columns;
    let mut x = if tall { x.transpose() } else { x } / length.reshape([1, 1]);
    for _ in 0..iterations {
        let gram = x.clone().matmul(x.clone().transpose());
        let polynomial = gram.clone() * B + gram.clone().matmul(gram) * C;
        x = x.clone() * A + polynomial.matmul(x);
    }
    if tall { x.transpose() } else { x }
}

/// √Σ g² over all parameters, `[1]`.
fn norm(grads: &[Option<Tensor<1>>], device: &Device) -> Tensor<1> {
    let squares: Vec<Tensor<1>> = grads.iter().flatten().map(|grad| (grad.clone() * grad.clone()).sum()).collect();
    match squares.is_empty() {
        true => Tensor::zeros([1], device),
        false => Tensor::cat(squares, 0).sum().sqrt(),
    }
}

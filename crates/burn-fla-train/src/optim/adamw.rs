//! Decoupled weight decay, f32 moments, bias correction (Loshchilov & Hutter, "Decoupled Weight Decay Regularization").

use burn::module::Module;
use burn::tensor::{Bool, Device, Tensor};

use super::{ParamRule, ParamRules, ParamTable};
use crate::TrainError;
use crate::recipe::{OptimizerSection, TrainingSection};

/// AdamW over the parameters of a [`ParamTable`].
///
/// With g the gradient after the clip (g ← g · min(1, max_norm / (‖g‖ + 1e-6)), ‖g‖ over all parameters):
///
/// m ← β₁ m + (1 − β₁) g,  v ← β₂ v + (1 − β₂) g²,
/// p ← p (1 − η λ) − η (m / c₁) / (√(v / c₂) + ε),
///
/// where cᵢ = 1 − βᵢᵗ over the t updates made. When ‖g‖ is not finite (and `skip_nan_inf` is set) the step changes
/// neither parameters nor moments nor t. That decision, the norm and the counters stay on the device: a step never
/// waits for it. The bias corrections follow the recurrence of the moments (c ← β c + 1 − β), which needs no host
/// and loses no digits when β is near 1.
#[derive(Clone, Debug)]
pub struct AdamW {
    beta1: f64,
    beta2: f64,
    eps: f64,
    max_norm: f64,
    skip: bool,
    table: ParamTable,
    rules: Vec<ParamRule>,
    state: AdamWState,
}

/// What a checkpoint must hold to continue exactly.
#[derive(Clone, Debug)]
pub struct AdamWState {
    /// First moments, flattened, in the table's order.
    pub first: Vec<Tensor<1>>,
    /// Second moments.
    pub second: Vec<Tensor<1>>,
    /// 1 − β₁ᵗ, 1 − β₂ᵗ, skips in a row, the most skips in a row, skips in all; each `[1]`.
    pub scalars: [Tensor<1>; 5],
}

/// The names of [`AdamWState::scalars`] in a checkpoint.
pub(crate) const SCALAR_NAMES: [&str; 5] =
    ["correction1", "correction2", "skipped_in_a_row", "skipped_most", "skipped"];

/// What a step leaves on the device for the log.
#[derive(Clone, Debug)]
pub struct StepReport {
    /// The gradient's norm before the clip, `[1]`.
    pub grad_norm: Tensor<1>,
    /// The most skips in a row so far, `[1]`.
    pub skipped_most: Tensor<1>,
    /// Skips in a row up to this step, `[1]`.
    pub skipped_in_a_row: Tensor<1>,
    /// Skips in all, `[1]`.
    pub skipped: Tensor<1>,
}

/// The factors of one step, `[1]` each, on the device.
struct Factors {
    clip: Option<Tensor<1>>,
    bad: Option<Tensor<1, Bool>>,
    beta1: Tensor<1>,
    beta2: Tensor<1>,
    /// η, zero when the step is skipped.
    lr: Tensor<1>,
    /// 1 / c₁ and 1 / c₂.
    inverse1: Tensor<1>,
    inverse2: Tensor<1>,
}

impl AdamW {
    /// An optimiser with zero moments on `device`, which must have no autodiff.
    ///
    /// # Errors
    /// A group whose pattern is no regular expression.
    pub fn new(
        table: ParamTable,
        optimizer: &OptimizerSection,
        training: &TrainingSection,
        device: &Device,
    ) -> Result<AdamW, TrainError> {
        let rules = ParamRules::new(optimizer)?;
        let entries = table.entries();
        let zeros = || entries.iter().map(|entry| Tensor::zeros([entry.len()], device)).collect();
        let scalar = || Tensor::zeros([1], device);
        Ok(AdamW {
            beta1: optimizer.beta1,
            beta2: optimizer.beta2,
            eps: optimizer.eps,
            max_norm: training.max_norm,
            skip: training.skip_nan_inf,
            rules: entries.iter().map(|entry| rules.of(&entry.name, entry.shape.len())).collect(),
            state: AdamWState {
                first: zeros(),
                second: zeros(),
                scalars: [scalar(), scalar(), scalar(), scalar(), scalar()],
            },
            table,
        })
    }

    /// The parameters it updates.
    pub fn table(&self) -> &ParamTable {
        &self.table
    }

    /// Moments and counters.
    pub fn state(&self) -> &AdamWState {
        &self.state
    }

    /// Continues from saved moments and counters, which must have the shapes of [`AdamW::state`].
    pub fn set_state(&mut self, state: AdamWState) {
        self.state = state;
    }

    /// One update of `model` (without autodiff) with gradients in the table's order and learning rate `lr`.
    pub fn step<M: Module>(&mut self, model: M, mut grads: Vec<Option<Tensor<1>>>, lr: f64) -> (M, StepReport) {
        let device = self.state.scalars[0].device();
        let grad_norm = norm(&grads, &device);
        let factors = self.factors(&grad_norm, lr, &device);
        let table = self.table.clone();
        let model = table.map(model, &mut |at, value| match grads[at].take() {
            Some(grad) => self.update(at, value, grad, &factors),
            None => value,
        });
        let [_, _, in_a_row, most, all] = &self.state.scalars;
        let report = StepReport {
            grad_norm,
            skipped_most: most.clone(),
            skipped_in_a_row: in_a_row.clone(),
            skipped: all.clone(),
        };
        (model, report)
    }

    /// Advances corrections and counters, and makes the factors that every parameter shares.
    fn factors(&mut self, grad_norm: &Tensor<1>, lr: f64, device: &Device) -> Factors {
        let full = |value: f64| Tensor::<1>::full([1], value, device);
        // A product with zero does not undo NaN, so a skip selects: the gradient becomes zero, β becomes 1 and η 0,
        // which leaves moments and parameters as they were to the last bit.
        let bad = self.skip.then(|| grad_norm.clone().is_finite().bool_not());
        let select = |value: f64, otherwise: f64| match &bad {
            None => full(value),
            Some(bad) => full(value).mask_fill(bad.clone(), otherwise),
        };
        let (beta1, beta2) = (select(self.beta1, 1.0), select(self.beta2, 1.0));
        let [c1, c2, in_a_row, most, all] = &mut self.state.scalars;
        *c1 = c1.clone() * beta1.clone() + select(1.0 - self.beta1, 0.0);
        *c2 = c2.clone() * beta2.clone() + select(1.0 - self.beta2, 0.0);
        if let Some(bad) = &bad {
            let skipped = bad.clone().float();
            *in_a_row = (in_a_row.clone() + 1.0) * skipped.clone();
            *most = most.clone().max_pair(in_a_row.clone());
            *all = all.clone() + skipped;
        }
        let clip = (self.max_norm > 0.0).then(|| ((grad_norm.clone() + 1e-6).recip() * self.max_norm).clamp_max(1.0));
        Factors {
            clip,
            bad: bad.clone(),
            beta1,
            beta2,
            lr: select(lr, 0.0),
            // Before the first update c is zero, and so are the moments it divides.
            inverse1: c1.clone().clamp_min(1.0 - self.beta1).recip(),
            inverse2: c2.clone().clamp_min(1.0 - self.beta2).recip(),
        }
    }

    /// The update of one parameter; all tensors are flat.
    fn update(&mut self, at: usize, value: Tensor<1>, grad: Tensor<1>, f: &Factors) -> Tensor<1> {
        let rule = self.rules[at];
        let n = grad.dims()[0];
        let mut grad = grad;
        if let Some(clip) = &f.clip {
            grad = grad * clip.clone();
        }
        if let Some(bad) = &f.bad {
            grad = grad.mask_fill(bad.clone().expand([n]), 0.0);
        }
        let take = |slot: &mut Tensor<1>| std::mem::replace(slot, f.lr.clone());
        let first = take(&mut self.state.first[at]) * f.beta1.clone() + grad.clone() * (1.0 - self.beta1);
        let second = take(&mut self.state.second[at]) * f.beta2.clone() + grad.clone() * grad * (1.0 - self.beta2);
        let rate = f.lr.clone() * rule.lr_scale;
        let denominator = (second.clone() * f.inverse2.clone()).sqrt() + self.eps;
        let change = first.clone() * (rate.clone() * f.inverse1.clone()) / denominator;
        self.state.first[at] = first;
        self.state.second[at] = second;
        let kept = if rule.weight_decay == 0.0 { value } else { value * (rate * -rule.weight_decay + 1.0) };
        kept - change
    }
}

/// √Σ g² over all parameters, `[1]`.
fn norm(grads: &[Option<Tensor<1>>], device: &Device) -> Tensor<1> {
    let squares: Vec<Tensor<1>> = grads.iter().flatten().map(|grad| (grad.clone() * grad.clone()).sum()).collect();
    if squares.is_empty() {
        return Tensor::zeros([1], device);
    }
    Tensor::cat(squares, 0).sum().sqrt()
}

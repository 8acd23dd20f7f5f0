//! The update in plain tensor operations, parameter by parameter.

use burn::tensor::{Bool, Device, Tensor};

use super::{AdamWOptions, AdamWSlot, AdamWStep, AdamWUpdated};

/// The factors of one update, `[1]` each, on the device.
struct Factors {
    clip: Option<Tensor<1>>,
    bad: Option<Tensor<1, Bool>>,
    beta1: Tensor<1>,
    beta2: Tensor<1>,
    /// η before the group's scale, zero when the update is skipped.
    lr: Tensor<1>,
    /// 1 / c₁ and 1 / c₂.
    inverse1: Tensor<1>,
    inverse2: Tensor<1>,
}

pub(super) fn adamw(slots: Vec<AdamWSlot>, counters: Tensor<1>, options: AdamWOptions) -> AdamWStep {
    let norm = norm(&slots, &counters.device());
    let (factors, counters) = factors(counters, &norm, &options);
    let updated = slots.into_iter().map(|slot| update(slot, &factors, &options)).collect();
    AdamWStep { updated, counters, norm }
}

/// √Σ g² over all parameters, `[1]`.
fn norm(slots: &[AdamWSlot], device: &Device) -> Tensor<1> {
    let grads = slots.iter().map(|slot| &slot.grad).filter(|grad| grad.dims() != [0]);
    let squares: Vec<Tensor<1>> = grads.map(|grad| (grad.clone() * grad.clone()).sum()).collect();
    if squares.is_empty() {
        return Tensor::zeros([1], device);
    }
    Tensor::cat(squares, 0).sum().sqrt()
}

/// The factors that every parameter shares, and the counters after the update.
fn factors(counters: Tensor<1>, norm: &Tensor<1>, options: &AdamWOptions) -> (Factors, Tensor<1>) {
    let device = counters.device();
    let full = |value: f64| Tensor::<1>::full([1], value, &device);
    // A product with zero does not undo NaN, so a skip selects: the gradient becomes zero, β becomes 1 and η 0, which
    // leaves moments and parameters as they were to the last bit.
    let bad = options.skip_non_finite.then(|| norm.clone().is_finite().bool_not());
    let select = |value: f64, otherwise: f64| match &bad {
        None => full(value),
        Some(bad) => full(value).mask_fill(bad.clone(), otherwise),
    };
    let [c1, c2, mut in_a_row, mut most, mut all] = std::array::from_fn(|at| counters.clone().narrow(0, at, 1));
    let (beta1, beta2) = (select(options.beta1, 1.0), select(options.beta2, 1.0));
    let c1 = c1 * beta1.clone() + select(1.0 - options.beta1, 0.0);
    let c2 = c2 * beta2.clone() + select(1.0 - options.beta2, 0.0);
    if let Some(bad) = &bad {
        let skipped = bad.clone().float();
        in_a_row = (in_a_row + 1.0) * skipped.clone();
        most = most.max_pair(in_a_row.clone());
        all = all + skipped;
    }
    let clip = (options.max_norm > 0.0).then(|| ((norm.clone() + 1e-6).recip() * options.max_norm).clamp_max(1.0));
    let factors = Factors {
        clip,
        bad: bad.clone(),
        beta1,
        beta2,
        lr: select(options.lr, 0.0),
        // Before the first update c is zero, and so are the moments it divides.
        inverse1: c1.clone().clamp_min(1.0 - options.beta1).recip(),
        inverse2: c2.clone().clamp_min(1.0 - options.beta2).recip(),
    };
    (factors, Tensor::cat(vec![c1, c2, in_a_row, most, all], 0))
}

fn update(slot: AdamWSlot, f: &Factors, options: &AdamWOptions) -> AdamWUpdated {
    let AdamWSlot { value, mut grad, first, second, lr_scale, weight_decay } = slot;
    let n = grad.dims()[0];
    if n == 0 {
        return AdamWUpdated { value, first, second };
    }
    if let Some(clip) = &f.clip {
        grad = grad * clip.clone();
    }
    if let Some(bad) = &f.bad {
        grad = grad.mask_fill(bad.clone().expand([n]), 0.0);
    }
    let first = first * f.beta1.clone() + grad.clone() * (1.0 - options.beta1);
    let second = second * f.beta2.clone() + grad.clone() * grad * (1.0 - options.beta2);
    let rate = f.lr.clone() * lr_scale;
    let denominator = (second.clone() * f.inverse2.clone()).sqrt() + options.eps;
    let change = first.clone() * (rate.clone() * f.inverse1.clone()) / denominator;
    let kept = if weight_decay == 0.0 { value } else { value * (rate * -weight_decay + 1.0) };
    AdamWUpdated { value: kept - change, first, second }
}

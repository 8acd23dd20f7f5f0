//! The learning rate as a pure function of the step.

use crate::recipe::{DecayKind, SchedulerSection};

/// Warm-up, optional stable phase, decay.
///
/// With W warm-up steps, S steps in all and D = S − W (no `decay_ratio`) or D = r·S:
/// - t < W: (t + 1) / (W + 1), so that the first step already learns;
/// - t < S − D: 1;
/// - else, with x = (t − (S − D)) / D: m + (1 − m) f(x), where f falls from 1 to 0 as half a cosine, a line or 1 − √x.
#[derive(Clone, Debug)]
pub struct Schedule {
    section: SchedulerSection,
}

impl Schedule {
    /// The schedule of a recipe.
    pub fn new(section: &SchedulerSection) -> Self {
        Schedule { section: section.clone() }
    }

    /// The factor of the peak rate at `step` (counted from 0) of a run of `total` steps.
    pub fn factor(&self, step: u64, total: u64) -> f64 {
        let SchedulerSection { warmup_steps, decay_ratio, decay_type, lr_min } = &self.section;
        if step < *warmup_steps {
            return (step + 1) as f64 / (*warmup_steps + 1) as f64;
        }
        let after_warmup = total.saturating_sub(*warmup_steps) as f64;
        let decay = decay_ratio.map_or(after_warmup, |ratio| (ratio * total as f64).min(after_warmup));
        let into = step as f64 - (total as f64 - decay);
        if into <= 0.0 || decay <= 0.0 {
            return 1.0;
        }
        let x = (into / decay).min(1.0);
        let fall = match decay_type {
            DecayKind::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * x).cos()),
            DecayKind::Linear => 1.0 - x,
            DecayKind::Sqrt => 1.0 - x.sqrt(),
        };
        lr_min + (1.0 - lr_min) * fall
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(warmup_steps: u64, decay_ratio: Option<f64>, decay_type: DecayKind) -> Schedule {
        Schedule::new(&SchedulerSection { warmup_steps, decay_ratio, decay_type, lr_min: 0.1 })
    }

    #[test]
    fn warm_up_then_cosine() {
        let s = schedule(9, None, DecayKind::Cosine);
        assert!((s.factor(0, 109) - 0.1).abs() < 1e-12);
        assert!((s.factor(8, 109) - 0.9).abs() < 1e-12);
        assert!((s.factor(9, 109) - 1.0).abs() < 1e-12);
        assert!((s.factor(59, 109) - 0.55).abs() < 1e-12);
        assert!((s.factor(109, 109) - 0.1).abs() < 1e-12);
        assert!((s.factor(500, 109) - 0.1).abs() < 1e-12, "it must not rise again after the end");
    }

    #[test]
    fn warm_up_stable_decay() {
        let s = schedule(10, Some(0.2), DecayKind::Linear);
        assert_eq!(s.factor(10, 100), 1.0);
        assert_eq!(s.factor(80, 100), 1.0);
        assert!((s.factor(90, 100) - 0.55).abs() < 1e-12);
        let s = schedule(10, Some(0.2), DecayKind::Sqrt);
        assert!((s.factor(85, 100) - 0.55).abs() < 1e-12);
        assert!((s.factor(100, 100) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn degenerate_lengths() {
        let s = schedule(0, None, DecayKind::Cosine);
        assert_eq!(s.factor(0, 1), 1.0);
        assert_eq!(s.factor(0, 0), 1.0);
        let s = schedule(5, Some(1.0), DecayKind::Linear);
        assert_eq!(s.factor(5, 10), 1.0);
        let s = schedule(5, Some(0.0), DecayKind::Linear);
        assert_eq!(s.factor(9, 10), 1.0);
    }
}

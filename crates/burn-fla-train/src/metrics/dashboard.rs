//! burn-train's dashboard (feature `tui`): curves of the figures, progress, and `q` to stop.

use std::fmt;
use std::sync::Arc;

use burn::train::Interrupter;
use burn::train::metric::{
    MetricAttributes, MetricDefinition, MetricEntry, MetricId, NumericAttributes, NumericEntry, SerializedEntry,
};
use burn::train::renderer::{MetricState, MetricsRenderer};

use super::{TrainLine, ValidationLine};

const LOSS: &str = "Loss";
const BITS: &str = "Bits per byte";
const ACCURACY: &str = "Answers right";
const RATE: &str = "Learning rate";
const NORM: &str = "Gradient norm";
const SPEED: &str = "Tokens per second";
const MEMORY: &str = "Memory";

/// A run's figures on burn-train's renderer.
pub struct Dashboard {
    renderer: Box<dyn MetricsRenderer>,
    interrupter: Interrupter,
    /// What could not be written while the dashboard had the terminal.
    kept: Vec<String>,
}

impl fmt::Debug for Dashboard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dashboard").field("kept", &self.kept).finish_non_exhaustive()
    }
}

impl Dashboard {
    /// Takes the terminal for a run that is at `step` of `total` steps, if those are known.
    pub fn open(step: u64, total: Option<u64>) -> Dashboard {
        let interrupter = Interrupter::new();
        let renderer = burn::train::renderer::tui::TuiMetricsRendererWrapper::new(interrupter.clone(), None);
        Dashboard::on(Box::new(renderer), interrupter, step, total)
    }

    /// The same on any renderer.
    pub fn on(
        mut renderer: Box<dyn MetricsRenderer>,
        interrupter: Interrupter,
        step: u64,
        total: Option<u64>,
    ) -> Dashboard {
        let metrics = [
            (LOSS, Some("nats"), false),
            (BITS, None, false),
            (ACCURACY, Some("%"), true),
            (RATE, None, false),
            (NORM, None, false),
            (SPEED, None, true),
            (MEMORY, Some("GiB"), false),
        ];
        for (name, unit, higher_is_better) in metrics {
            let attributes = NumericAttributes { unit: unit.map(String::from), higher_is_better };
            renderer.register_metric(MetricDefinition {
                metric_id: id(name),
                name: Arc::new(name.to_string()),
                description: None,
                attributes: MetricAttributes::Numeric(attributes),
            });
        }
        // One epoch of as many items as there are steps.
        let total = total.unwrap_or(0) as usize;
        renderer.start(1, 1, Some(total), None);
        renderer.start_split("train", total);
        renderer.update_split(step as usize);
        Dashboard { renderer, interrupter, kept: Vec::new() }
    }

    /// Whether `q` was pressed.
    pub fn asked_to_stop(&self) -> bool {
        self.interrupter.should_stop()
    }

    /// A step was made.
    pub fn step(&mut self, step: u64) {
        self.renderer.update_split(step as usize);
    }

    /// A log step.
    pub fn train(&mut self, line: &TrainLine) {
        let figures = [
            (LOSS, line.loss, format!("{:.4}", line.loss)),
            (RATE, line.lr, format!("{:.3e}", line.lr)),
            (NORM, line.grad_norm, format!("{:.3}", line.grad_norm)),
            (SPEED, line.tokens_per_s, format!("{:.0}", line.tokens_per_s)),
        ];
        for (name, value, text) in figures {
            self.renderer.update_train(state(name, value, text));
        }
        if let Some(most) = line.memory.most() {
            self.renderer.update_train(state(MEMORY, most, format!("{most:.2}")));
        }
    }

    /// An evaluation.
    pub fn validation(&mut self, line: &ValidationLine) {
        let accuracy = line.validation_accuracy.map(|share| 100.0 * share);
        let figures = [(LOSS, Some(line.validation_loss)), (BITS, line.validation_bits_per_byte), (ACCURACY, accuracy)];
        for (name, value) in figures {
            if let Some(value) = value {
                self.renderer.update_valid(state(name, value, format!("{value:.4}")));
            }
        }
    }

    /// Keeps a text until the terminal is free again.
    pub fn keep(&mut self, text: &str) {
        self.kept.push(text.to_string());
    }

    /// Gives the terminal back; what was kept is to be written now.
    pub fn close(self) -> Vec<String> {
        let Dashboard { mut renderer, kept, .. } = self;
        renderer.end_split();
        renderer.end();
        drop(renderer);
        kept
    }
}

fn id(name: &str) -> MetricId {
    MetricId::new(Arc::new(name.to_string()))
}

fn state(name: &str, value: f64, text: String) -> MetricState {
    let entry = SerializedEntry { formatted: text, serialized: value.to_string() };
    MetricState::Numeric(MetricEntry::new(id(name), entry), value.is_finite().then_some(NumericEntry::Value(value)))
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use burn::train::logger::{EvaluationProgressLogger, TrainingProgressLogger};
    use burn::train::renderer::{EvaluationName, MetricsRendererEvaluation, MetricsRendererTraining};

    use super::*;

    /// Writes down what it is told.
    struct Record(Arc<Mutex<Vec<String>>>);

    impl Record {
        fn say(&self, text: String) {
            self.0.lock().unwrap().push(text);
        }

        fn metric(&self, split: &str, state: MetricState) {
            let MetricState::Numeric(entry, number) = state else { panic!("no number") };
            let number = number.map(|number| number.current());
            self.say(format!("{split} {:?} {} {number:?}", entry.metric_id, entry.serialized_entry.formatted));
        }
    }

    impl MetricsRendererTraining for Record {
        fn update_train(&mut self, state: MetricState) {
            self.metric("train", state);
        }
        fn update_valid(&mut self, state: MetricState) {
            self.metric("valid", state);
        }
    }

    impl MetricsRendererEvaluation for Record {
        fn update_test(&mut self, _: EvaluationName, _: MetricState) {}
    }

    impl MetricsRenderer for Record {
        fn manual_close(&mut self) {}
        fn register_metric(&mut self, definition: MetricDefinition) {
            self.say(format!("metric {}", definition.name));
        }
    }

    impl TrainingProgressLogger for Record {
        fn start(&mut self, _: usize, _: usize, items: Option<usize>, _: Option<&str>) {
            self.say(format!("start {items:?}"));
        }
        fn update_epoch(&mut self, _: usize) {}
        fn start_split(&mut self, split: &str, items: usize) {
            self.say(format!("split {split} {items}"));
        }
        fn update_split(&mut self, items: usize) {
            self.say(format!("at {items}"));
        }
        fn end_split(&mut self) {}
        fn end(&mut self) {
            self.say("end".to_string());
        }
        fn log_event_training(&mut self, _: String) {}
    }

    impl EvaluationProgressLogger for Record {
        fn start_global_progress(&mut self, _: usize) {}
        fn start_test(&mut self, _: &str, _: usize) {}
        fn update_test_progress(&mut self, _: usize) {}
        fn end_test(&mut self) {}
        fn end_global_progress(&mut self) {}
        fn log_event_evaluation(&mut self, _: String) {}
    }

    #[test]
    fn the_renderer_is_told_what_happens() {
        let told = Arc::new(Mutex::new(Vec::new()));
        let interrupter = Interrupter::new();
        let mut dashboard = Dashboard::on(Box::new(Record(told.clone())), interrupter.clone(), 3, Some(10));
        dashboard.step(4);
        dashboard.train(&TrainLine {
            step: 4,
            tokens: 100,
            loss: 2.5,
            lr: 1e-3,
            grad_norm: f64::NAN,
            tokens_per_s: 1234.5,
            flops_per_s: 1.0,
            mfu: None,
            sources: Vec::new(),
            data_wait_s: 0.0,
            seconds: 1.0,
            skipped: 0,
            memory: Default::default(),
        });
        dashboard.keep("a note");
        assert!(!dashboard.asked_to_stop());
        interrupter.stop(None);
        assert!(dashboard.asked_to_stop());
        assert_eq!(dashboard.close(), ["a note"]);
        let told = told.lock().unwrap();
        let has = |text: &str| assert!(told.iter().any(|line| line.contains(text)), "{text}: {told:?}");
        for text in ["metric Loss", "start Some(10)", "split train 10", "at 3", "at 4", "2.5000 Some(2.5)", "1.000e-3"]
        {
            has(text);
        }
        has("NaN None");
        assert_eq!(told.last().unwrap(), "end");
    }
}

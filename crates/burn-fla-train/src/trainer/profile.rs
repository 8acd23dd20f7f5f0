//! Where the milliseconds of a step go.
//!
//! A device works behind the program's back, so its parts can only be told apart by waiting for it after each: that is
//! done in every `profiling.freq`-th step, which is slower for it, and never in the others.

use std::time::{Duration, Instant};

use burn::tensor::Device;

use crate::TrainError;
use crate::metrics::memory::gibibytes;
use crate::metrics::{Journal, Line, ProfileLine};
use crate::recipe::ProfilingSection;

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// Waiting for rows.
    Data,
    /// Rows to the device.
    Upload,
    /// Forward and loss; the output layer's gradient is made there too.
    Forward,
    /// Backward.
    Backward,
    /// Sums over micro-batches and threads, and the update.
    Optimizer,
}

const PARTS: [(Part, &str); 5] = [
    (Part::Data, "data"),
    (Part::Upload, "upload"),
    (Part::Forward, "forward"),
    (Part::Backward, "backward"),
    (Part::Optimizer, "optimizer"),
];

/// Time by part, and the most memory that was seen at the end of any: bytes in use, and bytes that the allocator has
/// reserved; 0 where the device does not tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Times {
    parts: [Duration; PARTS.len()],
    memory: [u64; 2],
}

impl Times {
    /// The sum, for what came one after the other.
    pub(super) fn then(self, other: Times) -> Times {
        let parts = std::array::from_fn(|at| self.parts[at] + other.parts[at]);
        Times { parts, memory: self.most_memory(other.memory) }
    }

    /// The longer of each part, for what ran side by side.
    pub(super) fn beside(self, other: Times) -> Times {
        let parts = std::array::from_fn(|at| self.parts[at].max(other.parts[at]));
        Times { parts, memory: self.most_memory(other.memory) }
    }

    fn most_memory(&self, other: [u64; 2]) -> [u64; 2] {
        std::array::from_fn(|at| self.memory[at].max(other[at]))
    }
}

/// Measures the parts of one step on one thread.
#[derive(Debug)]
pub(super) struct Stopwatch {
    device: Device,
    last: Instant,
    times: Times,
}

impl Stopwatch {
    /// Starts when the device has done what it was given.
    pub(super) fn start(device: &Device) -> Result<Stopwatch, TrainError> {
        let device = device.clone().inner();
        wait(&device)?;
        Ok(Stopwatch { device, last: Instant::now(), times: Times::default() })
    }

    /// What happened since the last call was `part`.
    pub(super) fn lap(&mut self, part: Part) -> Result<(), TrainError> {
        wait(&self.device)?;
        self.times.parts[part as usize] += self.last.elapsed();
        if let Some(usage) = self.device.memory_pool_usage() {
            self.times.memory = self.times.most_memory([usage.bytes_in_use, usage.bytes_reserved]);
        }
        self.last = Instant::now();
        Ok(())
    }

    /// What happened since the last call was measured by other stopwatches.
    pub(super) fn add(&mut self, times: Times) {
        self.times = self.times.then(times);
        self.last = Instant::now();
    }

    pub(super) fn times(&self) -> Times {
        self.times
    }
}

fn wait(device: &Device) -> Result<(), TrainError> {
    device.sync().map_err(|error| TrainError::Execution(error.to_string()))
}

/// The profile of a run.
#[derive(Debug)]
pub(super) struct Profiler {
    freq: u64,
    journal: Journal,
    steps: Vec<Times>,
    /// Evaluations and saves so far, and what they took: these wait for the device anyway.
    rest: [(&'static str, u32, Duration); 2],
}

impl Profiler {
    /// The profile of a run that continues after `step`, if the recipe asks for one.
    pub(super) fn open(section: &ProfilingSection, step: u64) -> Result<Option<Profiler>, TrainError> {
        if !section.enable {
            return Ok(None);
        }
        let folder = &section.folder;
        std::fs::create_dir_all(folder).map_err(TrainError::io("create the folder", folder))?;
        let journal = Journal::open(&folder.join("profile.jsonl"), step)?;
        let rest = [("validation", 0, Duration::ZERO), ("checkpoint", 0, Duration::ZERO)];
        Ok(Some(Profiler { freq: section.freq, journal, steps: Vec::new(), rest }))
    }

    /// Whether the step that makes the count `step` is to be measured.
    pub(super) fn wants(&self, step: u64) -> bool {
        step.is_multiple_of(self.freq)
    }

    /// Keeps the times of a step: a line for the terminal.
    pub(super) fn step(&mut self, step: u64, times: Times) -> Result<String, TrainError> {
        self.steps.push(times);
        let [data_ms, upload_ms, forward_ms, backward_ms, optimizer_ms] = times.parts.map(milliseconds);
        let [in_use, reserved] = times.memory.map(gibibytes);
        let told = times.memory[1] > 0;
        let (in_use_gib, reserved_gib) = (told.then_some(in_use), told.then_some(reserved));
        let line =
            ProfileLine { step, data_ms, upload_ms, forward_ms, backward_ms, optimizer_ms, in_use_gib, reserved_gib };
        self.journal.write(&Line::Profile(line))?;
        let parts: Vec<String> = PARTS
            .iter()
            .map(|(part, name)| format!("{name} {:.1}", milliseconds(times.parts[*part as usize])))
            .collect();
        let total = milliseconds(times.parts.iter().sum());
        let memory = match told {
            true => format!("; {in_use:.2} GiB in use at the end of a part, {reserved:.2} reserved"),
            false => String::new(),
        };
        Ok(format!("profile of step {step}: {} = {total:.1} ms{memory}", parts.join(" + ")))
    }

    pub(super) fn validation(&mut self, time: Duration) {
        self.rest[0].1 += 1;
        self.rest[0].2 += time;
    }

    pub(super) fn checkpoint(&mut self, time: Duration) {
        self.rest[1].1 += 1;
        self.rest[1].2 += time;
    }

    /// The table at the end: medians, so that a first step, which compiles kernels, does not count.
    pub(super) fn summary(&self) -> Option<String> {
        if self.steps.is_empty() {
            return None;
        }
        let median = |at: usize| {
            let mut times: Vec<Duration> = self.steps.iter().map(|times| times.parts[at]).collect();
            times.sort();
            milliseconds(times[times.len() / 2])
        };
        let medians: Vec<f64> = (0..PARTS.len()).map(median).collect();
        let total: f64 = medians.iter().sum();
        let mut text =
            format!("profile: medians of {} steps, each measured with the device waited for", self.steps.len());
        for ((_, name), time) in PARTS.iter().zip(&medians) {
            text += &format!("\n  {name:<12}{time:>10.2} ms{:>7.1} %", 100.0 * time / total.max(1e-9));
        }
        text += &format!("\n  {:<12}{total:>10.2} ms", "step");
        let [in_use, reserved] = self.steps.iter().fold([0; 2], |most, times| times.most_memory(most)).map(gibibytes);
        if reserved > 0.0 {
            text +=
                &format!("\n  {:<12}{in_use:>10.2} GiB in use at the end of a part, {reserved:.2} reserved", "memory");
        }
        for (name, count, time) in self.rest.iter().filter(|(_, count, _)| *count > 0) {
            text += &format!("\n  {name:<12}{:>10.2} ms each, {count} of them", milliseconds(*time / *count));
        }
        Some(text)
    }
}

/// To the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(milliseconds: [u64; 5]) -> Times {
        Times { parts: milliseconds.map(Duration::from_millis), memory: [0; 2] }
    }

    #[test]
    fn parts_add_up_and_side_by_side_the_longest_counts() {
        let (a, b) = (times([1, 2, 3, 4, 5]), times([5, 0, 3, 6, 1]));
        assert_eq!(a.then(b), times([6, 2, 6, 10, 6]));
        assert_eq!(a.beside(b), times([5, 2, 3, 6, 5]));
        let (a, b) = (Times { memory: [5, 7], ..a }, Times { memory: [6, 6], ..b });
        assert_eq!((a.then(b).memory, a.beside(b).memory), ([6, 7], [6, 7]));
    }

    #[test]
    fn lines_and_summary_have_every_part() {
        let folder = tempfile::tempdir().unwrap();
        let section = ProfilingSection { enable: true, freq: 5, folder: folder.path().join("profile") };
        let mut profiler = Profiler::open(&section, 0).unwrap().unwrap();
        assert!(!profiler.wants(4) && profiler.wants(5) && !profiler.wants(6) && profiler.wants(10));
        assert_eq!(profiler.summary(), None);
        for (step, forward) in [(5, 9_000), (10, 30), (15, 20)] {
            let line = profiler.step(step, times([1, 2, forward, 40, 8])).unwrap();
            let total = 51 + forward;
            let expected = format!(
                "profile of step {step}: data 1.0 + upload 2.0 + forward {forward}.0 + backward 40.0 + optimizer 8.0 = {total}.0 ms"
            );
            assert_eq!(line, expected);
        }
        assert!(!profiler.summary().unwrap().contains("memory"), "no device has told");
        let memory = [3 << 30, 5 << 29];
        let line = profiler.step(20, Times { memory, ..times([1, 2, 30, 40, 8]) }).unwrap();
        assert!(line.ends_with(" = 81.0 ms; 3.00 GiB in use at the end of a part, 2.50 reserved"), "{line}");
        assert!(profiler.summary().unwrap().contains("memory            3.00 GiB in use at the end of a part, 2.50"));
        profiler.validation(Duration::from_millis(10));
        profiler.validation(Duration::from_millis(20));
        let summary = profiler.summary().unwrap();
        for part in ["4 steps", "forward          30.00 ms", "81.00 ms", "validation       15.00 ms each, 2 of them"] {
            assert!(summary.contains(part), "{summary}");
        }
        assert!(!summary.contains("checkpoint"), "{summary}");
        let written = std::fs::read_to_string(section.folder.join("profile.jsonl")).unwrap();
        assert_eq!(written.lines().count(), 4);
        assert!(
            written.contains(r#""step":10,"data_ms":1.0"#) && written.contains(r#""forward_ms":30.0"#),
            "{written}"
        );
        let off = ProfilingSection { enable: false, ..section };
        assert!(Profiler::open(&off, 0).unwrap().is_none());
    }
}

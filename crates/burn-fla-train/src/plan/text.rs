//! A plan as people read it.

use std::fmt;

use super::Plan;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "model      {} with {} parameters", self.model_type, Count(self.parameters as f64))?;
        if self.embedding_parameters > 0 {
            writeln!(f, "           of them {} in the embedding", Count(self.embedding_parameters as f64))?;
        }
        writeln!(f, "\nmixer             layers  parameters  state   cache/token  FLOPs/token: maps  mixer")?;
        for mixer in &self.mixers {
            writeln!(
                f,
                "{:<17} {:>6}  {:>10}  {:>6}  {:>11}  {:>17}  {:>5}",
                mixer.kind,
                mixer.layers,
                Count(mixer.parameters as f64).to_string(),
                Count(mixer.state as f64).to_string(),
                Count(mixer.cache as f64).to_string(),
                Count(mixer.map_flops).to_string(),
                Count(mixer.mixer_flops).to_string(),
            )?;
        }
        let flops = &self.flops;
        writeln!(f, "FLOPs of a token: {} forward, {} in training", Count(flops.forward), Count(flops.training))?;

        let memory = &self.memory;
        writeln!(f, "\nmemory     {} on the device", Bytes(memory.total()))?;
        writeln!(
            f,
            "           parameters {}, gradients {}, moments {}, activations about {}",
            Bytes(memory.parameters),
            Bytes(memory.gradients),
            Bytes(memory.moments),
            Bytes(memory.activations)
        )?;

        write!(f, "\nbudget     {} tokens a step", self.tokens_per_step)?;
        match (self.steps, self.tokens) {
            (Some(steps), Some(tokens)) => {
                let per_parameter = tokens as f64 / self.parameters.max(1) as f64;
                writeln!(f, ", {steps} steps, {} tokens ({per_parameter:.1} a parameter)", Count(tokens as f64))?;
                let total = flops.training * tokens as f64;
                writeln!(f, "           {total:.2e} FLOPs in training")?;
            }
            _ => writeln!(f, "; the steps depend on the rate: give --tokens-per-s")?,
        }
        for source in &self.data {
            writeln!(f, "data       {source}")?;
        }
        let (known, needed) = (self.data.iter().map(|source| source.tokens).sum::<u64>(), self.tokens);
        if let (Some(needed), true) = (needed, known > 0) {
            writeln!(f, "           {:.2} epochs of them", needed as f64 / known as f64)?;
        }
        if !self.learning_rates.is_empty() {
            writeln!(f, "\nstep       learning rate")?;
            for (step, rate) in &self.learning_rates {
                writeln!(f, "{step:>9}  {rate:.3e}")?;
            }
        }
        match (self.seconds, self.tokens_per_s) {
            (Some(seconds), Some(rate)) => {
                let flops = flops.training * rate / 1e12;
                writeln!(f, "\ntime       {} at {rate:.0} tokens/s, which are {flops:.3} TFLOP/s", Time(seconds))?;
            }
            (Some(seconds), None) => writeln!(f, "\ntime       {}", Time(seconds))?,
            (None, _) => writeln!(f, "\ntime       unknown: no run in the run folder yet; give --tokens-per-s")?,
        }
        for notice in &self.notices {
            writeln!(f, "note       {notice}")?;
        }
        Ok(())
    }
}

/// A number in three digits.
pub(crate) struct Count(pub f64);

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scaled, unit) = match self.0 {
            x if x < 1e3 => return write!(f, "{x:.0}"),
            x if x < 1e6 => (x / 1e3, "k"),
            x if x < 1e9 => (x / 1e6, "M"),
            x if x < 1e12 => (x / 1e9, "G"),
            x => (x / 1e12, "T"),
        };
        let digits = if scaled < 10.0 { 2 } else { usize::from(scaled < 100.0) };
        write!(f, "{scaled:.digits$} {unit}")
    }
}

struct Bytes(u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 as f64 {
            x if x < 1e9 => write!(f, "{:.1} MB", x / 1e6),
            x => write!(f, "{:.2} GB", x / 1e9),
        }
    }
}

struct Time(f64);

impl fmt::Display for Time {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            s if s < 120.0 => write!(f, "{s:.0} s"),
            s if s < 7200.0 => write!(f, "{:.0} min", s / 60.0),
            s if s < 172_800.0 => write!(f, "{:.1} h", s / 3600.0),
            s => write!(f, "{:.1} days", s / 86_400.0),
        }
    }
}

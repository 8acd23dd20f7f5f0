//! What the benches share: a measured result with the machine, the commit and the command that gave it, kept as JSON in
//! `benches/results/`, and `benches/RESULTS.md`, which is written from these files alone.

mod plot;
mod result;
mod rows;

pub use plot::plot;
pub use result::{BenchResult, Table, load, machine, render};
pub use rows::{engines, operators, steps};

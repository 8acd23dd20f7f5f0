//! The trainer: the optimiser against plain f64, runs that resume to the last bit, recall, bad input.

#[path = "train/bad_input.rs"]
mod bad_input;
#[path = "train/branch.rs"]
mod branch;
#[path = "train/by_block.rs"]
mod by_block;
#[path = "train/faults.rs"]
mod faults;
#[path = "train/fuzz.rs"]
mod fuzz;
#[path = "train/mqar.rs"]
mod mqar;
#[path = "train/muon.rs"]
mod muon;
#[path = "train/optimizer.rs"]
mod optimizer;
#[path = "train/resume.rs"]
mod resume;
#[path = "train/runs.rs"]
mod runs;
#[path = "train/shipped.rs"]
mod shipped;
#[path = "train/throughput.rs"]
mod throughput;

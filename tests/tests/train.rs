//! The trainer: the optimiser against plain f64, runs that resume to the last bit, bad input.

#[path = "train/optimizer.rs"]
mod optimizer;

//! facade

// Only its symbols are needed.
#[cfg(feature = "cuda")]
use burn_fla_llvm_stubs as _;

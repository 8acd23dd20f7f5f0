use burn::tensor::DType;

/// What was wrong with the arguments of an operator.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum OpError {
    /// An argument has another shape than the others ask for.
    #[error("{op}: `{argument}` has shape {found:?}, but {expected} is needed")]
    Shape {
        /// The operator.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its shape.
        found: Vec<usize>,
        /// The shape that would be right, in words.
        expected: String,
    },
    /// An argument has a dtype that the operator does not take here.
    #[error("{op}: `{argument}` is {found:?}, but {expected} is needed; cast it first")]
    DType {
        /// The operator.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its dtype.
        found: DType,
        /// The dtype that would be right, in words.
        expected: String,
    },
    /// Two arguments live on different devices.
    #[error("{op}: `{argument}` is on {found}, the other arguments on {expected}; move it with `to_device`")]
    Device {
        /// The operator.
        op: &'static str,
        /// The argument.
        argument: &'static str,
        /// Its device.
        found: String,
        /// The device of the first argument.
        expected: String,
    },
    /// Offsets of packed sequences that cannot be.
    #[error("cu_seqlens: {reason}")]
    CuSeqlens {
        /// What is wrong, and what would be right.
        reason: String,
    },
    /// An option outside its range.
    #[error("{op}: option `{option}` {reason}")]
    Option {
        /// The operator.
        op: &'static str,
        /// The option.
        option: &'static str,
        /// What is wrong, and what would be right.
        reason: String,
    },
}

//! Products inside an operator: [`linear`](super::linear)'s choice of kernels, over plain buffers.

use burn::backend::ops::FloatTensorOps;
use burn::tensor::DType;
use burn_cubecl::kernel::cast;
use burn_cubecl::{CubeBackend, CubeDevice};

use crate::bridge::{CubeTensor, contiguous};

/// A matrix of a product, or its transpose.
#[derive(Clone, Copy)]
pub(crate) struct Side<'a> {
    tensor: &'a CubeTensor,
    transposed: bool,
}

impl<'a> Side<'a> {
    /// The matrix as it is stored.
    pub(crate) fn plain(tensor: &'a CubeTensor) -> Self {
        Self { tensor, transposed: false }
    }

    /// Its transpose.
    pub(crate) fn transposed(tensor: &'a CubeTensor) -> Self {
        Self { tensor, transposed: true }
    }

    fn view(self) -> CubeTensor {
        let mut view = self.tensor.clone();
        if self.transposed {
            view.meta.swap(0, 1);
        }
        view
    }
}

/// Whether a tensor is on a CUDA device.
pub(crate) fn on_cuda(tensor: &CubeTensor) -> bool {
    matches!(tensor.device, CubeDevice::Cuda(_))
}

/// The product of two matrices of one dtype, with rows one after the other, in `dtype`.
pub(crate) fn multiply(a: Side<'_>, b: Side<'_>, dtype: DType) -> CubeTensor {
    #[cfg(feature = "cuda")]
    {
        let (a, b) = ((a.tensor, a.transposed), (b.tensor, b.transposed));
        if let Ok(product) = super::hopper::try_multiply(a, b, super::hopper::Target::New(dtype)) {
            return product;
        }
    }
    let product = match a.tensor.dtype == DType::F32 && on_cuda(a.tensor) {
        true => super::exact::launch(a.view(), b.view()),
        false => CubeBackend::float_matmul(a.view(), b.view()),
    };
    contiguous(cast(product, dtype))
}

/// `sum + a · b` in f32, in place where nobody else holds `sum`.
pub(crate) fn multiply_add(a: Side<'_>, b: Side<'_>, sum: CubeTensor) -> CubeTensor {
    #[cfg(feature = "cuda")]
    let sum = {
        let sum = crate::bridge::owned(sum);
        let (a, b) = ((a.tensor, a.transposed), (b.tensor, b.transposed));
        match super::hopper::try_multiply(a, b, super::hopper::Target::Sum(sum)) {
            Ok(sum) => return sum,
            Err(super::hopper::Target::Sum(sum)) => sum,
            Err(super::hopper::Target::New(_)) => unreachable!("it gives back what it was given"),
        }
    };
    CubeBackend::float_add(sum, multiply(a, b, DType::F32))
}

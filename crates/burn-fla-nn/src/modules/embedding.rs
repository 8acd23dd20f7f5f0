//! Token embedding.

use burn::module::{Module, Param};
use burn::tensor::{DType, Int, Tensor, module};

use crate::{Init, ParamScope};

/// h = W\[id\].
#[derive(Module, Debug)]
pub struct Embedding {
    /// W, `[vocabulary, width]`.
    pub weight: Param<Tensor<2>>,
    /// The id whose row never receives a gradient from a look-up.
    pub padding_id: Option<usize>,
}

impl Embedding {
    /// A table from N(0, std), the row of `padding_id` included.
    pub fn new(scope: &ParamScope<'_, '_>, vocabulary: usize, width: usize, padding_id: Option<usize>) -> Self {
        Self::start(scope, vocabulary, width, padding_id, &Init::Normal)
    }

    /// A table that starts as told.
    pub fn start(
        scope: &ParamScope<'_, '_>,
        vocabulary: usize,
        width: usize,
        padding_id: Option<usize>,
        init: &Init<'_>,
    ) -> Self {
        Self { weight: scope.start("weight", [vocabulary, width], init), padding_id }
    }

    /// # Shapes
    /// - input `[batch, tokens]`, each id below the size of the vocabulary (not checked: ids are on the device)
    /// - output `[batch, tokens, width]` in `dtype`
    pub fn forward(&self, ids: Tensor<2, Int>, dtype: DType) -> Tensor<3> {
        let h = module::embedding(self.weight.val(), ids.clone());
        let h = match self.padding_id {
            Some(padding) if h.is_tracked() => {
                let [b, t, d] = h.dims();
                let padding = ids.equal_elem(padding as i64).unsqueeze_dim::<3>(2).expand([b, t, d]);
                let constant = h.clone().detach();
                h.mask_where(padding, constant)
            }
            _ => h,
        };
        h.cast(dtype)
    }
}

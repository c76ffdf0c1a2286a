//! Where the weights of a base come from.

use candle_core::{Device, Tensor};
use lora_ops::linear::Weight;
use lora_spec::LinearModule;

use crate::ModelError;

/// The weights of a model on the device of its base, by their names in the base's files.
pub(crate) trait WeightSource {
    /// Returns the device of the base.
    fn device(&self) -> &Device;

    /// Returns a dense matrix: the embedding or the head.
    fn matrix(&self, name: &str) -> Result<Tensor, ModelError>;

    /// Returns a vector as f32: the weight of a norm, or a bias.
    fn vector(&self, name: &str) -> Result<Tensor, ModelError>;

    /// Returns the weight of a linear module of a block.
    fn weight(&self, module: &LinearModule) -> Result<Weight, ModelError>;
}

//! Linear weights as bitsandbytes stores them: the tensors of a weight, and checks that they match.

use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::Deserialize;

use super::{SafetensorsError, SafetensorsIndex, TensorEntry};
use crate::LinearModule;

/// Block sizes that bitsandbytes supports for 4-bit weights.
pub const FOUR_BIT_BLOCK_SIZES: [usize; 8] = [32, 64, 128, 256, 512, 1024, 2048, 4096];

/// Bytes of a quantization state that are read at most; no valid state has more.
const MAX_QUANT_STATE_BYTES: u64 = 1 << 16;

/// How a base stores the weight of a linear module.
#[derive(Debug, Clone, PartialEq)]
pub enum StoredWeight {
    /// `weight`, in a float type.
    Dense,
    /// Two codes a byte in `weight`, scales in `weight.absmax`.
    FourBit(FourBitState),
    /// Signed bytes in `weight`, a scale for each row in `SCB`.
    Int8,
}

/// The contents of `weight.quant_state.bitsandbytes__*`.
#[derive(Debug, Clone, PartialEq)]
pub struct FourBitState {
    /// The values that the codes represent.
    pub quant_type: FourBitType,
    /// Elements that share a scale.
    pub block: usize,
    /// Set if the scales are quantized too: the number of scales that share an element of
    /// `weight.nested_absmax`, and the mean that was subtracted from the scales.
    pub nested: Option<(usize, f32)>,
}

/// A 4-bit type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FourBitType {
    /// NormalFloat (QLoRA, arXiv 2305.14314).
    Nf4,
    /// 4-bit floats.
    Fp4,
}

impl FourBitType {
    /// Returns the name that bitsandbytes uses.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nf4 => "nf4",
            Self::Fp4 => "fp4",
        }
    }
}

/// The JSON text in the state's tensor.
#[derive(Deserialize)]
struct QuantState {
    quant_type: FourBitType,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f64>,
}

impl SafetensorsIndex {
    /// Returns how the weight of `module` is stored.
    ///
    /// # Errors
    /// A tensor that is missing or does not match the module's shape. The error names it.
    pub fn weight(&self, module: &LinearModule) -> Result<StoredWeight, SafetensorsError> {
        let name = format!("{}.weight", module.name);
        let weight = self.tensor(&name)?;
        let shape = [module.out_features, module.in_features];
        let states = [FourBitType::Nf4, FourBitType::Fp4]
            .map(|kind| format!("{name}.quant_state.bitsandbytes__{}", kind.name()));
        if let Some(state) = states.iter().find(|state| self.tensors.contains_key(*state)) {
            return self.four_bit(&name, weight, state, shape).map(StoredWeight::FourBit);
        }
        match weight.dtype.as_str() {
            "I8" => {
                self.check_tensor(&name, "I8", &shape)?;
                self.check_tensor(&format!("{}.SCB", module.name), "F32", &shape[..1])?;
                Ok(StoredWeight::Int8)
            }
            "U8" => Err(self.fail(weight, format!("tensor {name} is U8, but {} is missing", states[0]))),
            _ => {
                self.check_dense(&name, &shape)?;
                Ok(StoredWeight::Dense)
            }
        }
    }

    fn four_bit(
        &self,
        name: &str,
        weight: &TensorEntry,
        state_name: &str,
        shape: [usize; 2],
    ) -> Result<FourBitState, SafetensorsError> {
        let entry = self.tensor(state_name)?;
        let fail = |message: String| self.fail(entry, format!("tensor {state_name}: {message}"));
        let mut json = vec![0; (entry.bytes.end - entry.bytes.start).min(MAX_QUANT_STATE_BYTES) as usize];
        File::open(self.files[entry.file].path())
            .and_then(|file| file.read_exact_at(&mut json, entry.bytes.start))
            .map_err(|e| fail(e.to_string()))?;
        let state: QuantState = serde_json::from_slice(&json).map_err(|e| fail(e.to_string()))?;
        if state.shape != shape {
            return Err(fail(format!("shape is {:?}; config.json requires {shape:?}", state.shape)));
        }
        if !FOUR_BIT_BLOCK_SIZES.contains(&state.blocksize) {
            return Err(fail(format!(
                "blocksize {} is not supported; supported: {FOUR_BIT_BLOCK_SIZES:?}",
                state.blocksize
            )));
        }
        let elements = shape[0] * shape[1];
        // The type in which the bytes are stored (`bnb_4bit_quant_storage`) does not change them.
        let (bytes, expected) = (weight.bytes.end - weight.bytes.start, elements.div_ceil(2) as u64);
        if bytes != expected {
            return Err(self.fail(
                weight,
                format!("tensor {name} has {bytes} bytes; {shape:?} in 4 bits has {expected}"),
            ));
        }
        self.check_tensor(&format!("{name}.quant_map"), "F32", &[16])?;
        let blocks = elements.div_ceil(state.blocksize);
        let absmax = format!("{name}.absmax");
        let nested = match (state.nested_blocksize, state.nested_offset) {
            (None, None) => {
                self.check_tensor(&absmax, "F32", &[blocks])?;
                None
            }
            (Some(block), Some(offset)) if block.is_power_of_two() && (offset as f32).is_finite() => {
                self.check_tensor(&absmax, "U8", &[blocks])?;
                self.check_tensor(&format!("{name}.nested_absmax"), "F32", &[blocks.div_ceil(block)])?;
                self.check_tensor(&format!("{name}.nested_quant_map"), "F32", &[256])?;
                Some((block, offset as f32))
            }
            _ => {
                return Err(fail(
                    "nested_blocksize must be a power of two, and nested_offset a finite number".into(),
                ));
            }
        };
        Ok(FourBitState { quant_type: state.quant_type, block: state.blocksize, nested })
    }

    fn check_tensor(&self, name: &str, dtype: &str, shape: &[usize]) -> Result<(), SafetensorsError> {
        let entry = self.tensor(name)?;
        if entry.dtype != dtype || entry.shape != shape {
            let (stored, dims) = (&entry.dtype, &entry.shape);
            return Err(
                self.fail(entry, format!("tensor {name} is {stored} {dims:?}; it must be {dtype} {shape:?}"))
            );
        }
        Ok(())
    }
}

//! Reading of a base's tensors, one at a time, so that at most one tensor is in memory twice.

use std::fs::File;
use std::os::unix::fs::FileExt;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use lora_ops::linear::Weight;
use lora_ops::quant::{Codebook, FourBit, Int8, Scales};
use lora_ops::transfer::from_vec;
use lora_spec::{
    BaseDtype, BaseFormat, FourBitState, FourBitType, LinearModule, Quantization, SafetensorsError,
    SafetensorsIndex, SourceFile, StoredWeight, TensorEntry,
};

use crate::ModelError;

/// The open safetensors files of a base.
pub(crate) struct WeightReader<'a> {
    index: &'a SafetensorsIndex,
    files: Vec<File>,
    device: &'a Device,
}

impl<'a> WeightReader<'a> {
    pub(crate) fn open(index: &'a SafetensorsIndex, device: &'a Device) -> Result<Self, ModelError> {
        let open = |file: &SourceFile| File::open(file.path()).map_err(|source| ModelError::io(file, source));
        let files = index.files.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self { index, files, device })
    }

    pub(crate) fn device(&self) -> &Device {
        self.device
    }

    /// Reads a tensor of floats onto the device as `dtype`. `Auto` keeps bf16 and widens other
    /// types to f32.
    pub(crate) fn read(&self, name: &str, dtype: BaseDtype) -> Result<Tensor, ModelError> {
        let entry = self.entry(name)?;
        let shape = entry.shape.as_slice();
        let stored_bf16 = entry.dtype == "BF16" && dtype != BaseDtype::F32;
        let tensor = if stored_bf16 {
            let bytes = self.bytes(name)?;
            let values: Vec<bf16> =
                bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b)).collect();
            self.check_finite(name, values.iter().map(|value| value.to_f32()))?;
            from_vec(values, shape, self.device)?
        } else if dtype == BaseDtype::Bf16 {
            let values = self.floats(name)?.into_iter().map(bf16::from_f32).collect();
            from_vec(values, shape, self.device)?
        } else {
            from_vec(self.floats(name)?, shape, self.device)?
        };
        Ok(tensor)
    }

    /// Reads the tensor at `entry` as it is stored.
    pub(crate) fn stored(&self, name: &str, entry: &TensorEntry) -> Result<Tensor, ModelError> {
        let TensorEntry { dtype, shape, .. } = entry;
        let dtype = match dtype.as_str() {
            "F32" => DType::F32,
            "F16" => DType::F16,
            "BF16" => DType::BF16,
            "U8" => DType::U8,
            "I64" => DType::I64,
            other => return Err(self.tensor_error(name, format!("is {other}, which cannot be copied"))),
        };
        Ok(Tensor::from_raw_buffer(&self.bytes_of(name, entry)?, dtype, shape, &Device::Cpu)?)
    }

    /// Reads a linear module's weight in the given format. A weight that is stored quantized stays
    /// as it is.
    pub(crate) fn weight(&self, module: &LinearModule, format: BaseFormat) -> Result<Weight, ModelError> {
        let name = format!("{}.weight", module.name);
        let shape = (module.out_features, module.in_features);
        let wrong = |e: candle_core::Error| self.tensor_error(&name, e.to_string());
        Ok(match (self.index.weight(module)?, format.quantization) {
            (StoredWeight::FourBit(state), _) => {
                self.four_bit(&name, shape, &state)?.to_device(self.device)?.into()
            }
            (StoredWeight::Int8, _) => {
                let codes = Tensor::from_vec(self.bytes(&name)?, shape, &Device::Cpu)?;
                let scales = self.vector(&format!("{}.SCB", module.name))?;
                Int8::new(codes, scales).map_err(wrong)?.to_device(self.device)?.into()
            }
            (StoredWeight::Dense, Quantization::None) => self.read(&name, format.dtype)?.into(),
            (StoredWeight::Dense, quantization) => {
                let mut values = self.floats(&name)?;
                if format.dtype == BaseDtype::Bf16 {
                    values.iter_mut().for_each(|v| *v = bf16::from_f32(*v).to_f32());
                }
                quantize(&values, shape, quantization)
                    .and_then(|w| w.to_device(self.device))
                    .map_err(wrong)?
            }
        })
    }

    fn four_bit(
        &self,
        name: &str,
        shape: (usize, usize),
        state: &FourBitState,
    ) -> Result<FourBit, ModelError> {
        let codebook = match state.quant_type {
            FourBitType::Nf4 => Codebook::Nf4,
            FourBitType::Fp4 => Codebook::Fp4,
        };
        let map = format!("{name}.quant_map");
        let differs = |(a, b): (&f32, f32)| a.is_nan() || (a - b).abs() > 1e-6;
        if self.floats(&map)?.iter().zip(codebook.values()).any(differs) {
            let message = format!("is not the codebook of {}", state.quant_type.name());
            return Err(self.tensor_error(&map, message));
        }
        let absmax = format!("{name}.absmax");
        let scales = match state.nested {
            None => Scales::Plain(self.vector(&absmax)?),
            Some((block, offset)) => Scales::Nested {
                codes: bytes(self.bytes(&absmax)?)?,
                map: self.vector(&format!("{name}.nested_quant_map"))?,
                absmax: self.vector(&format!("{name}.nested_absmax"))?,
                offset,
                block,
            },
        };
        let codes = bytes(self.bytes(name)?)?;
        FourBit::new(shape, codebook, state.block, codes, scales)
            .map_err(|e| self.tensor_error(&absmax, e.to_string()))
    }

    /// Reads a vector of floats as f32, on the CPU.
    fn vector(&self, name: &str) -> Result<Tensor, ModelError> {
        let values = self.floats(name)?;
        let len = values.len();
        Ok(Tensor::from_vec(values, len, &Device::Cpu)?)
    }

    /// Reads a matrix of floats as f32, on the CPU.
    pub(crate) fn dense(&self, name: &str) -> Result<Tensor, ModelError> {
        let shape = self.entry(name)?.shape.as_slice();
        Ok(Tensor::from_vec(self.floats(name)?, shape, &Device::Cpu)?)
    }

    /// Reads a tensor's elements, widened to f32.
    fn floats(&self, name: &str) -> Result<Vec<f32>, ModelError> {
        let bytes = self.bytes(name)?;
        let halves = || bytes.as_chunks::<2>().0.iter();
        let values: Vec<f32> = match self.entry(name)?.dtype.as_str() {
            "BF16" => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            "F16" => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            "F32" => bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            other => return Err(self.tensor_error(name, format!("is {other}, not a float"))),
        };
        self.check_finite(name, values.iter().copied())?;
        Ok(values)
    }

    /// Checks that no value is NaN or infinite: every loss would be NaN.
    fn check_finite(&self, name: &str, values: impl Iterator<Item = f32>) -> Result<(), ModelError> {
        match values.enumerate().find(|(_, value)| !value.is_finite()) {
            Some((at, value)) => {
                let message = format!("element {at} is {value}; download the base again, or repair it");
                Err(self.tensor_error(name, message))
            }
            None => Ok(()),
        }
    }

    fn bytes(&self, name: &str) -> Result<Vec<u8>, ModelError> {
        self.bytes_of(name, self.entry(name)?)
    }

    fn bytes_of(&self, name: &str, entry: &TensorEntry) -> Result<Vec<u8>, ModelError> {
        let mut bytes = vec![0; (entry.bytes.end - entry.bytes.start) as usize];
        self.files[entry.file]
            .read_exact_at(&mut bytes, entry.bytes.start)
            .map_err(|e| self.tensor_error(name, e.to_string()))?;
        Ok(bytes)
    }

    fn entry(&self, name: &str) -> Result<&TensorEntry, ModelError> {
        self.index.tensors.get(name).ok_or_else(|| self.tensor_error(name, "is missing".into()))
    }

    pub(crate) fn tensor_error(&self, name: &str, message: String) -> ModelError {
        let file = self.index.tensors.get(name).map_or(0, |entry| entry.file);
        let file = self.index.files.get(file).map(|file| file.name().to_owned()).unwrap_or_default();
        SafetensorsError { name: file, message: format!("tensor {name}: {message}") }.into()
    }
}

/// Quantizes dense values, on the CPU.
pub(crate) fn quantize(
    values: &[f32],
    shape: (usize, usize),
    quantization: Quantization,
) -> candle_core::Result<Weight> {
    Ok(match quantization {
        Quantization::None => Tensor::from_slice(values, shape, &Device::Cpu)?.into(),
        Quantization::Nf4 { double_quant } => {
            FourBit::quantize(values, shape, Codebook::Nf4, double_quant)?.into()
        }
        Quantization::Int8 => Int8::quantize(values, shape)?.into(),
    })
}

fn bytes(bytes: Vec<u8>) -> Result<Tensor, ModelError> {
    let len = bytes.len();
    Ok(Tensor::from_vec(bytes, len, &Device::Cpu)?)
}

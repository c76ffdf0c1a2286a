//! The command-line flags.

use std::num::{NonZeroU32, NonZeroUsize};
use std::str::FromStr;

use clap::{Parser, ValueEnum};
use lora_spec::{ActivationCheckpointing, BaseDtype, BaseFormat, DeviceSpec, Quantization};

/// Measure the time of training steps
///
/// Example: train_step --model llama-3.2-1b --device cuda:0 --dtype bf16 --sequence 2048
#[derive(Debug, Parser)]
#[command(version)]
pub(crate) struct Args {
    /// Model shape: smollm2-135m, llama-3.2-1b, llama-3.1-8b, qwen2.5-7b, or the path of a
    /// config.json
    #[arg(long, default_value = "smollm2-135m")]
    pub(crate) model: String,
    /// Device: cpu or cuda:N
    #[arg(long, default_value = "cpu")]
    pub(crate) device: DeviceSpec,
    /// Data type of the base
    #[arg(long, value_enum, default_value_t = Dtype::F32)]
    pub(crate) dtype: Dtype,
    /// Quantization of the blocks' linear weights
    #[arg(long, value_enum, default_value_t = Quantized::None)]
    pub(crate) quantization: Quantized,
    /// Positions per row
    #[arg(long, default_value = "256")]
    sequence: NonZeroU32,
    /// Rows per micro-batch
    #[arg(long, default_value = "2")]
    micro_batch: NonZeroU32,
    /// Micro-batches to measure one after the other over one base, as ROWSxPOSITIONS, for example
    /// 1x2048,8x512; replaces --sequence and --micro-batch
    #[arg(long, value_delimiter = ',', conflicts_with_all = ["sequence", "micro_batch"])]
    cases: Vec<MicroBatchCase>,
    /// Activations that the backward pass recomputes instead of storing them
    #[arg(long, value_enum, default_value_t = Checkpointing::None)]
    pub(crate) activation_checkpointing: Checkpointing,
    /// CPU threads of the engine
    #[arg(long, default_value = "2")]
    pub(crate) threads: NonZeroUsize,
    /// Unmeasured steps before the measured steps of each case
    #[arg(long, default_value_t = 2)]
    pub(crate) warmup: usize,
    /// Measured steps of each case
    #[arg(long, default_value = "8")]
    pub(crate) steps: NonZeroUsize,
    /// Peak of the device in TFLOP/s; the default is the published dense bf16 peak of known GPUs
    #[arg(long)]
    pub(crate) peak_tflops: Option<f64>,
    /// Print one line of JSON per case
    #[arg(long)]
    pub(crate) json: bool,
    /// Print a profile: on the CPU the time of the measured steps by operation, on a GPU the time
    /// of additional steps by kernel and matrix product
    #[arg(long)]
    pub(crate) profile: bool,
    /// Divisor of the sizes of the product and the copy that measure the ceilings, for simulated
    /// GPUs
    #[arg(long, default_value = "1", hide = true)]
    pub(crate) ceilings_scale: NonZeroUsize,
}

impl Args {
    /// Returns the micro-batches to measure, at least one.
    pub(crate) fn cases(&self) -> Vec<MicroBatchCase> {
        if self.cases.is_empty() {
            return vec![MicroBatchCase { rows: self.micro_batch, positions: self.sequence }];
        }
        self.cases.clone()
    }

    /// Returns the data type and quantization of the base.
    pub(crate) fn format(&self) -> BaseFormat {
        let dtype = match self.dtype {
            Dtype::F32 => BaseDtype::F32,
            Dtype::Bf16 => BaseDtype::Bf16,
        };
        BaseFormat { dtype, quantization: self.quantization.into_spec() }
    }
}

/// The shape of a micro-batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MicroBatchCase {
    pub(crate) rows: NonZeroU32,
    pub(crate) positions: NonZeroU32,
}

impl FromStr for MicroBatchCase {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('x').map(|(rows, positions)| (rows.parse(), positions.parse()));
        match numbers {
            Some((Ok(rows), Ok(positions))) => Ok(Self { rows, positions }),
            _ => Err("must be ROWSxPOSITIONS, such as 2x2048, both at least 1".to_owned()),
        }
    }
}

/// Returns the name of an option's value on the command line.
pub(crate) fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
}

#[derive(Debug, Clone, Copy, PartialEq, ValueEnum)]
pub(crate) enum Dtype {
    F32,
    Bf16,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Quantized {
    None,
    Nf4,
    /// NF4 with double quantization
    Nf4Double,
    Int8,
}

impl Quantized {
    fn into_spec(self) -> Quantization {
        match self {
            Self::None => Quantization::None,
            Self::Nf4 => Quantization::Nf4 { double_quant: false },
            Self::Nf4Double => Quantization::Nf4 { double_quant: true },
            Self::Int8 => Quantization::Int8,
        }
    }
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Checkpointing {
    None,
    Block,
    BlockSaveAttention,
}

impl Checkpointing {
    pub(crate) fn into_spec(self) -> ActivationCheckpointing {
        match self {
            Self::None => ActivationCheckpointing::None,
            Self::Block => ActivationCheckpointing::Block,
            Self::BlockSaveAttention => ActivationCheckpointing::BlockSaveAttention,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cases(flags: &[&str]) -> Result<Vec<(u32, u32)>, clap::Error> {
        let args = Args::try_parse_from([&["train_step"], flags].concat())?;
        Ok(args.cases().iter().map(|case| (case.rows.get(), case.positions.get())).collect())
    }

    #[test]
    fn cases_are_rows_by_positions() {
        assert_eq!(cases(&[]).unwrap(), [(2, 256)]);
        assert_eq!(cases(&["--sequence", "512", "--micro-batch", "4"]).unwrap(), [(4, 512)]);
        assert_eq!(cases(&["--cases", "1x2048,8x512"]).unwrap(), [(1, 2048), (8, 512)]);
        for wrong in ["2048", "1x", "x1", "0x5", "5x0", "1x2x3", "1x-4", "1x2,"] {
            let error = cases(&["--cases", wrong]).unwrap_err().to_string();
            assert!(error.contains("must be ROWSxPOSITIONS"), "{wrong}: {error}");
        }
        assert!(cases(&["--cases", "1x2", "--sequence", "4"]).is_err());
    }
}

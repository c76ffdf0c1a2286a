//! The device of a worker.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The device of a worker as a setting: `auto`, `cpu`, `cuda:N`, or `cuda` for `cuda:0`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceSpec {
    /// The first GPU if the build supports GPUs and the machine has one, otherwise the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU with this index, from 0, among the GPUs that CUDA lists in this process.
    Cuda(usize),
}

/// The error for a text that is not a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("must be auto, cpu, cuda, or cuda:N with the number of a GPU, such as cuda:0")]
pub struct ParseDeviceError;

impl FromStr for DeviceSpec {
    type Err = ParseDeviceError;

    fn from_str(text: &str) -> Result<Self, ParseDeviceError> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => {
                let number = text.strip_prefix("cuda:").ok_or(ParseDeviceError)?;
                // `parse` alone would accept a sign.
                let digits = number.bytes().all(|byte| byte.is_ascii_digit());
                number.parse().ok().filter(|_| digits).map(Self::Cuda).ok_or(ParseDeviceError)
            }
        }
    }
}

impl TryFrom<String> for DeviceSpec {
    type Error = ParseDeviceError;

    fn try_from(text: String) -> Result<Self, ParseDeviceError> {
        text.parse()
    }
}

impl From<DeviceSpec> for String {
    fn from(device: DeviceSpec) -> Self {
        device.to_string()
    }
}

impl fmt::Display for DeviceSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_and_parse_round_trip() {
        for (text, device) in [
            ("auto", DeviceSpec::Auto),
            ("cpu", DeviceSpec::Cpu),
            ("cuda:0", DeviceSpec::Cuda(0)),
            ("cuda:13", DeviceSpec::Cuda(13)),
        ] {
            assert_eq!(text.parse(), Ok(device));
            assert_eq!(device.to_string(), text);
            let json = serde_json::to_string(&device).unwrap();
            assert_eq!(json, format!("{text:?}"));
            assert_eq!(serde_json::from_str::<DeviceSpec>(&json).unwrap(), device);
        }
        assert_eq!("cuda".parse(), Ok(DeviceSpec::Cuda(0)));
    }

    #[test]
    fn invalid_devices_are_rejected_with_the_valid_forms() {
        for text in [
            "",
            "gpu",
            "CPU",
            "cuda:",
            "cuda:+1",
            "cuda:-1",
            "cuda: 0",
            "cuda:0,1",
            "cuda:99999999999999999999",
        ] {
            assert_eq!(text.parse::<DeviceSpec>(), Err(ParseDeviceError), "{text}");
            let error = serde_json::from_value::<DeviceSpec>(text.into()).unwrap_err().to_string();
            assert!(error.starts_with("must be auto, cpu, cuda, or cuda:N"), "{error}");
        }
    }
}

//! Conversions between messages and the types of `lora-spec` and, for servers, `lora-plan`.

mod adapter_spec;
mod data_spec;
mod device_memory;
mod field;
mod job_spec;
mod model_spec;
mod phase;
#[cfg(feature = "server")]
mod plan;
mod run;
mod training_spec;
mod workers_spec;

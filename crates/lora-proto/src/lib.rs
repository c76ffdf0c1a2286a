//! The gRPC interface `lora.v1`, generated from `proto/`, and the conversions between its messages
//! and the types of `lora-spec` and `lora-plan`.
//!
//! The crate may not know the daemons. To read it, begin with `proto/lora/v1`, which describes each
//! message; `convert` has one file a message.

mod convert;
mod digest;
pub mod file_name;
#[cfg(feature = "client")]
pub mod file_transfer;
mod inputs;
#[cfg(feature = "client")]
mod partial_file;

pub use digest::DigestBuilder;
#[cfg(feature = "client")]
pub use partial_file::PartialFile;

/// Messages, clients (feature `client`) and servers (feature `server`) of the package `lora.v1`.
#[expect(missing_docs, reason = "generated; the fields are described in proto/")]
pub mod v1 {
    tonic::include_proto!("lora.v1");
}

/// The compiled descriptors of the package (a `FileDescriptorSet`), for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lora.v1.descriptors"));

/// Maximum number of bytes of a chunk of a file.
pub const CHUNK_BYTES: usize = 1 << 20;

/// Maximum number of bytes of a message, on both sides: a chunk, and 64 KiB for its frame.
pub const MAX_MESSAGE_BYTES: usize = CHUNK_BYTES + (64 << 10);

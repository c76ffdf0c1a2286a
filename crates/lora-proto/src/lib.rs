//! The gRPC interface `lora.v1`, generated from `proto/`, and the conversions between its messages and `lora-spec`.

mod digest;
#[cfg(feature = "client")]
pub mod file_transfer;
mod job;

pub use digest::DigestBuilder;

/// Messages, clients (feature `client`) and servers (feature `server`) of the package `lora.v1`.
#[expect(missing_docs, reason = "generated; the fields are described in proto/")]
pub mod v1 {
    tonic::include_proto!("lora.v1");
}

/// The compiled descriptors of the package (a `FileDescriptorSet`), for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/lora.v1.descriptors"));

/// Files travel in chunks of at most this many bytes.
pub const CHUNK_BYTES: usize = 1 << 20;

/// The most bytes a message may have, on both sides: a chunk and what frames it.
pub const MAX_MESSAGE_BYTES: usize = CHUNK_BYTES + (64 << 10);

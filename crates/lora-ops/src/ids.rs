//! Whole numbers that an operation takes beside its tensors: tokens, rows, positions.

use std::sync::Arc;

use candle_core::{Device, Result};

/// Numbers on the host and, where the computation is on a GPU, on their way to it: the copy is started when this is made
/// and does not wait for what the GPU is doing.
#[derive(Debug, Clone)]
pub struct Ids {
    host: Arc<[u32]>,
    #[cfg(feature = "cuda")]
    uploaded: Option<Arc<crate::cuda::UploadedInput>>,
}

impl Ids {
    /// `values` for operations on `device`.
    pub fn new(values: impl Into<Arc<[u32]>>, device: &Device) -> Result<Self> {
        let host = values.into();
        #[cfg(feature = "cuda")]
        let uploaded = match crate::backend::Backend::of_device(device)? {
            crate::backend::Backend::Cpu => None,
            crate::backend::Backend::Cuda(gpu) => Some(Arc::new(gpu.upload_input(&host)?)),
        };
        #[cfg(not(feature = "cuda"))]
        crate::backend::Backend::of_device(device)?;
        Ok(Self {
            host,
            #[cfg(feature = "cuda")]
            uploaded,
        })
    }

    /// f32 numbers, by their bits; kernels read them as f32.
    pub fn from_f32_bits(values: &[f32], device: &Device) -> Result<Self> {
        Self::new(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), device)
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.host.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// The numbers.
    pub fn host(&self) -> &[u32] {
        &self.host
    }

    /// The numbers on the GPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn arg(&self) -> Result<crate::cuda::Arg> {
        match &self.uploaded {
            Some(uploaded) => Ok(uploaded.arg().with_bytes(size_of::<u32>() * self.len())),
            None => candle_core::bail!("numbers that are on the CPU, for an operation on a GPU"),
        }
    }
}

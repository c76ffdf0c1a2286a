//! Integer operands of operations (token ids, row ids, positions).

use std::sync::Arc;

use candle_core::{Device, Result};

/// Integers on the host and, for a computation on a GPU, also on the GPU. The constructor starts
/// the copy, which does not wait for the GPU's other work.
#[derive(Debug, Clone)]
pub struct Ids {
    host: Arc<[u32]>,
    #[cfg(feature = "cuda")]
    uploaded: Option<Arc<crate::cuda::UploadedInput>>,
}

impl Ids {
    /// Takes `values` for operations on `device`; on a GPU, starts their copy.
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

    /// Takes f32 values, stored as their bits; kernels read them as f32.
    pub fn from_f32_bits(values: &[f32], device: &Device) -> Result<Self> {
        Self::new(values.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), device)
    }

    /// The number of values.
    pub fn len(&self) -> usize {
        self.host.len()
    }

    /// Whether there are no values.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// The values on the host.
    pub fn host(&self) -> &[u32] {
        &self.host
    }

    /// The values on the GPU.
    ///
    /// # Errors
    /// The values were created for the CPU.
    #[cfg(feature = "cuda")]
    pub(crate) fn arg(&self) -> Result<crate::cuda::Arg> {
        match &self.uploaded {
            Some(uploaded) => Ok(uploaded.arg().with_bytes(size_of::<u32>() * self.len())),
            None => candle_core::bail!("integers made for the CPU in an operation on a GPU"),
        }
    }
}

//! Matrix products by cuBLAS.
//!
//! cuBLAS gives the same bits for the same product on the same GPU model, if it uses one stream,
//! one workspace and no atomics. Sums are in f32 for all operand types; f32 operands are not
//! rounded to TF32.

use std::ffi::c_void;

use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{DType, Result};

use super::error::cuda_error;
use super::gpu::Gpu;
use super::profile::ProductKind;

/// `C = alpha op(A) op(B) + beta C` for row-major matrices: `C` `[m, n]`, `op(A)` `[m, k]`, `op(B)`
/// `[k, n]`. Rows of `A` as it is stored are `a_stride` elements apart, and rows of `C` `c_stride`;
/// the rows of `B` are contiguous.
pub(crate) struct Product {
    pub(crate) mnk: (usize, usize, usize),
    pub(crate) alpha: f32,
    pub(crate) beta: f32,
    /// Address, and whether the matrix is stored transposed.
    pub(crate) a: (u64, bool),
    pub(crate) a_stride: usize,
    /// Address, and whether the matrix is stored transposed.
    pub(crate) b: (u64, bool),
    pub(crate) c: u64,
    pub(crate) c_stride: usize,
    /// f32 or bf16.
    pub(crate) operands: DType,
    /// f32 or bf16.
    pub(crate) output: DType,
}

impl Product {
    fn kind(&self) -> ProductKind {
        ProductKind {
            mnk: self.mnk,
            a_transposed: self.a.1,
            b_transposed: self.b.1,
            adds: self.beta != 0.0,
            operands: self.operands,
            output: self.output,
        }
    }
}

impl Gpu {
    pub(crate) fn product(&self, product: &Product) -> Result<()> {
        let (m, n, k) = product.mnk;
        if m == 0 || n == 0 {
            return Ok(());
        }
        let size = |n: usize| match i32::try_from(n) {
            Ok(n) => Ok(n),
            Err(_) => candle_core::bail!("a product of {m} x {n} x {k} is too large for cuBLAS"),
        };
        let operation = |transposed: bool| match transposed {
            true => sys::cublasOperation_t::CUBLAS_OP_T,
            false => sys::cublasOperation_t::CUBLAS_OP_N,
        };
        let b_stride = if product.b.1 { k } else { n };
        let compute = match product.operands {
            DType::F32 => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_PEDANTIC,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        self.stream.context().bind_to_thread().map_err(cuda_error("a product"))?;
        let started = self.profile_start()?;
        // cuBLAS stores matrices by columns, so it computes with the transposes:
        // C^T = op(B)^T op(A)^T.
        // SAFETY: the callers check the tensors against the sizes.
        let done = unsafe {
            result::gemm_ex(
                *self.device.cublas_handle().handle(),
                operation(product.b.1),
                operation(product.a.1),
                size(n)?,
                size(m)?,
                size(k)?,
                (&raw const product.alpha).cast(),
                product.b.0 as *const c_void,
                data_type(product.operands)?,
                size(b_stride)?,
                product.a.0 as *const c_void,
                data_type(product.operands)?,
                size(product.a_stride)?,
                (&raw const product.beta).cast(),
                product.c as *mut c_void,
                data_type(product.output)?,
                size(product.c_stride)?,
                compute,
                sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        done.map_err(|e| candle_core::Error::Msg(format!("cuBLAS: product of {m} x {n} x {k}: {e:?}")).bt())?;
        match started {
            Some(started) => self.profile_product(started, product.kind()),
            None => Ok(()),
        }
    }
}

fn data_type(dtype: DType) -> Result<sys::cudaDataType> {
    match dtype {
        DType::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        DType::BF16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => candle_core::bail!("products do not support {other:?}"),
    }
}

//! Errors of CUDA's driver.

use candle_core::cuda_backend::cudarc::driver::DriverError;

/// The result of a call of CUDA's driver.
pub(super) type CudaResult<T> = Result<T, DriverError>;

/// Converts an error of CUDA's driver; `what` names the operation that failed.
pub(crate) fn cuda_error(what: &str) -> impl FnOnce(DriverError) -> candle_core::Error + '_ {
    move |error| {
        let text = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("unknown error");
        candle_core::Error::Msg(format!("{what}: CUDA error {:?}: {text}", error.0)).bt()
    }
}

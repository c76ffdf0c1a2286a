//! Model FLOPs utilization: the operations that the model requires per second, divided by the GPU's
//! peak.

/// Returns the published dense bf16 peak in TFLOP/s of the GPU in a device description; `None` for
/// a GPU that is not listed here and for the slower variants of Hopper (PCIe, NVL).
pub(crate) fn peak_tflops(device: &str) -> Option<f64> {
    if device.contains("PCIe") || device.contains("NVL") {
        return None;
    }
    device.split(&[' ', '-']).find_map(|word| match word {
        "A100" => Some(312.0),
        "H100" | "H200" => Some(989.0),
        "B200" => Some(2250.0),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use lora_plan::row_flops;

    use super::*;
    use crate::published_models::model_config;

    /// Frozen elements of a block: 2 x 4096^2 (q, o) + 2 x 4096 x 1024 (k, v) + 3 x 4096 x 14336
    /// (MLP) = 218,103,808. 32 blocks and a head of 128256 x 4096 = 525,336,576 elements have
    /// 7,504,658,432 elements. LoRA of rank 16 adds 16 (in + out) per matrix: 16 x (2 x 8192 + 2 x
    /// 5120 + 3 x 18432) x 32 = 41,943,040. Attention: 6 x 32 x 4096 x 2049 = 1,611,399,168 per
    /// token.
    #[test]
    fn llama_8b_at_2048_tokens() {
        let config = model_config("llama-3.1-8b").unwrap();
        let token = 4 * 7_504_658_432 + 6 * 41_943_040 + 1_611_399_168;
        assert_eq!(token, 31_881_691_136_u64);
        assert_eq!(row_flops(&config, 41_943_040, 2048), 2048 * token);
    }

    /// A tied head counts: 16 blocks of 60,817,408 elements and a head of 128256 x 2048 =
    /// 262,668,288 have 1,235,746,816 elements. Attention: 12 x 2048 features x 131,328 pairs x 16
    /// blocks = 51,640,270,848 per row.
    #[test]
    fn llama_1b_at_512_tokens() {
        let config = model_config("llama-3.2-1b").unwrap();
        let products = 512 * (4 * 1_235_746_816 + 6 * 11_272_192);
        assert_eq!(row_flops(&config, 11_272_192, 512), products + 51_640_270_848);
        assert_eq!(row_flops(&config, 11_272_192, 512), 2_617_077_923_840);
    }

    /// Biases do not count, because they are not products: 28 x 233,046,016 + 152064 x 3584 =
    /// 7,070,285,824. One token attends to one key: 12 x 3584 x 28 = 1,204,224.
    #[test]
    fn qwen_7b_at_one_token() {
        let config = model_config("qwen2.5-7b").unwrap();
        assert_eq!(row_flops(&config, 0, 1), 4 * 7_070_285_824 + 1_204_224);
    }

    /// With 5 queries and a window of 2, the first query attends to 1 key and the others to 2 keys:
    /// 9 pairs instead of 15.
    #[test]
    fn sliding_windows_reduce_attention_flops() {
        let mut config = model_config("llama-3.2-1b").unwrap();
        let all = row_flops(&config, 0, 5);
        assert_eq!(all, 5 * 4 * 1_235_746_816 + 12 * 2048 * 15 * 16);
        config.layers[3].sliding_window = Some(2);
        assert_eq!(row_flops(&config, 0, 5), all - 12 * 2048 * (15 - 9));
        config.layers[3].sliding_window = Some(5);
        assert_eq!(row_flops(&config, 0, 5), all);
    }

    #[test]
    fn known_gpus_have_their_published_peaks() {
        for (device, peak) in [
            ("cuda NVIDIA H200 sm_90 cublas 130000", Some(989.0)),
            ("cuda NVIDIA H100 80GB HBM3 sm_90 cublas 130000", Some(989.0)),
            ("cuda NVIDIA A100-SXM4-80GB sm_80 cublas 130000", Some(312.0)),
            ("cuda NVIDIA B200 sm_100 cublas 130000", Some(2250.0)),
            ("cuda NVIDIA H100 PCIe sm_90 cublas 130000", None),
            ("cuda NVIDIA H200 NVL sm_90 cublas 130000", None),
            ("cuda NVIDIA GH200 480GB sm_90 cublas 130000", None),
            ("cpu avx512f", None),
        ] {
            assert_eq!(peak_tflops(device), peak, "{device}");
        }
    }
}

//! Properties of the buffer sizes that are computed from shapes.

use lora_spec::{GPU_PANEL_BYTES, GPU_PANEL_ROW_ALIGNMENT, chunk_rows, gpu_panel_rows};

#[test]
fn panels_are_whole_weights_or_row_aligned_slices() {
    const BF16: usize = 2;
    const F32: usize = 4;
    for (weight, rows, cols, width, expected) in [
        ("Llama-3.1-8B q", 4096, 4096, BF16, 4096),
        ("Llama-3.1-8B k", 1024, 4096, BF16, 1024),
        ("Llama-3.1-8B gate", 14_336, 4096, BF16, 14_336),
        ("Llama-3.1-8B down", 4096, 14_336, BF16, 4096),
        ("Llama-3.1-8B down", 4096, 14_336, F32, 4096),
        ("Qwen2.5-7B k", 512, 3584, BF16, 512),
        ("Qwen2.5-7B gate", 18_944, 3584, BF16, 18_944),
        ("Qwen2.5-7B down", 3584, 18_944, BF16, 3584),
        // 259 MiB: two equal panels, not 256 MiB and a remainder.
        ("Qwen2.5-7B gate", 18_944, 3584, F32, 9472),
        ("Qwen2.5-7B down", 3584, 18_944, F32, 1792),
        ("Llama-3.1-70B gate", 28_672, 8192, BF16, 14_336),
        ("Llama-3.1-70B down", 8192, 28_672, BF16, 4096),
        ("one element", 1, 1, BF16, 1),
        ("no elements", 0, 0, BF16, 1),
        ("odd sides", 17, 33, F32, 17),
        ("a row more than fits", 4097, 32_768, BF16, 2304),
        ("no 256 rows fit, few rows", 200, 1 << 20, BF16, 200),
        ("no 256 rows fit", 257, 1 << 20, BF16, 256),
        ("no row fits", 1000, 1 << 28, BF16, 256),
    ] {
        assert_eq!(gpu_panel_rows(rows, cols, width), expected, "{weight} {rows} x {cols}, {width} bytes");
    }
    // For any shape: at least one row, at most the limit or 256 rows, aligned if there are several.
    for rows in [1, 2, 255, 256, 257, 511, 513, 1000, 4095, 4097, 18_944, 100_003] {
        for cols in [1, 31, 64, 999, 4096, 14_336, 28_672, 65_537, 524_288, 1_000_003] {
            for width in [BF16, F32] {
                let height = gpu_panel_rows(rows, cols, width);
                let what = format!("{rows} x {cols}, {width} bytes: {height}");
                assert!((1..=rows).contains(&height), "{what}");
                assert!(height == rows || height.is_multiple_of(GPU_PANEL_ROW_ALIGNMENT), "{what}");
                let limit = GPU_PANEL_BYTES.max(GPU_PANEL_ROW_ALIGNMENT * cols * width);
                assert!(height * cols * width <= limit, "{what}");
                assert!(height == rows || rows * cols * width > GPU_PANEL_BYTES, "{what}");
            }
        }
    }
}

#[test]
fn chunks_of_logits_are_about_equally_long() {
    for (rows, vocab, budget, expected) in [
        (2048, 128_256, 64 << 20, 512),
        (100, 10, 1000, 100),
        (101, 10, 1000, 51),
        (7, 10, 20, 2),
        (7, 10, 5, 1),
        (0, 10, 1000, 1),
        (4, 0, 10, 4),
    ] {
        assert_eq!(chunk_rows(rows, vocab, budget), expected, "{rows} x {vocab}, at most {budget}");
    }
}

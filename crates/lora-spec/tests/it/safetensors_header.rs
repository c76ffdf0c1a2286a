//! Headers of safetensors files, written by hand.

use std::fs;

use lora_spec::{SafetensorsIndex, TargetModules};

/// Opens a file with this header and so many bytes after it.
fn open(header: &str, bytes: usize) -> Result<SafetensorsIndex, String> {
    let dir = tempfile::tempdir().unwrap();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + bytes, 0);
    fs::write(dir.path().join("model.safetensors"), file).unwrap();
    SafetensorsIndex::open(&dir.path().into()).map_err(|error| error.to_string())
}

fn tensor(dtype: &str, shape: &str, offsets: &str) -> String {
    format!(r#"{{"model.a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": {offsets}}}}}"#)
}

#[test]
fn a_file_has_the_bytes_of_its_tensors_and_no_others() {
    let header = tensor("F32", "[2, 3]", "[0, 24]");
    assert!(open(&header, 24).is_ok());
    assert!(open(&header, 23).unwrap_err().contains("is truncated: "));
    assert!(open(&header, 25).unwrap_err().contains("has 1 bytes after its last tensor"));
    assert!(open("{}", 0).is_ok());
}

#[test]
fn offsets_match_type_and_shape() {
    for (dtype, bytes) in [("F32", 24), ("BF16", 12), ("F16", 12), ("U8", 6), ("I8", 6)] {
        assert!(open(&tensor(dtype, "[2, 3]", &format!("[0, {bytes}]")), bytes).is_ok(), "{dtype}");
        let wrong = open(&tensor(dtype, "[2, 4]", &format!("[0, {bytes}]")), bytes).unwrap_err();
        assert!(wrong.contains("of tensor model.a do not match its type and shape"), "{wrong}");
    }
    let reversed = open(&tensor("F32", "[1]", "[4, 0]"), 4).unwrap_err();
    assert!(reversed.contains("data_offsets 4..0 of tensor model.a do not match"), "{reversed}");
}

#[test]
fn a_header_is_within_its_file() {
    let dir = tempfile::tempdir().unwrap();
    let error = |file: &[u8]| {
        fs::write(dir.path().join("model.safetensors"), file).unwrap();
        SafetensorsIndex::open(&dir.path().into()).unwrap_err().to_string()
    };
    for size in [0_u64, 3, 100_000_000] {
        let found = error(&[&size.to_le_bytes()[..], b"{}"].concat());
        assert!(!found.contains("is not a safetensors file"), "{size}: {found}");
    }
    assert!(error(&[&3_u64.to_le_bytes()[..], b"{}"].concat()).contains("is truncated: 10 bytes"));
    let large = error(&[&100_000_001_u64.to_le_bytes()[..], b"{}"].concat());
    assert!(large.contains("is not a safetensors file: its header would have 100000001 bytes"), "{large}");
    assert!(error(b"short").contains("is truncated: 5 bytes"));
}

#[test]
fn modules_are_selected_by_whole_names_or_patterns() {
    let names = TargetModules::Names(vec!["q_proj".into(), "mlp.up_proj".into()]);
    let pattern = TargetModules::Pattern(".*\\.(q|k)_proj".into());
    for (module, named, matched) in [
        ("model.layers.0.self_attn.q_proj", true, true),
        ("model.layers.0.self_attn.k_proj", false, true),
        ("model.layers.0.mlp.up_proj", true, false),
        ("model.layers.0.xq_proj", false, false),
        ("q_proj", true, false),
    ] {
        assert_eq!(
            (names.selects(module), pattern.selects(module)),
            (Some(named), Some(matched)),
            "{module}"
        );
    }
    assert_eq!(TargetModules::Pattern("(?!a).*".into()).selects("a"), None);
}

//! Weights in 4 and 8 bits, compared with bitsandbytes (`tests/oracle/quant.py`).

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};
use lora_ops::linear::{FrozenLinear, Weight};
use lora_ops::quant::{Codebook, FourBit, Int8, Scales, dynamic_map};
use lora_test_kit::numbers;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::common::{assert_close, bits, matrix, random, vector, wide};

/// The tensors of a golden file.
struct Golden(Vec<u8>);

impl Golden {
    fn read(name: &str) -> Self {
        let dir = lora_test_kit::golden("quant");
        Self(std::fs::read(dir.join(name).with_extension("safetensors")).unwrap())
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().data().to_vec()
    }

    fn shape(&self, name: &str) -> (usize, usize) {
        let [rows, cols] = SafeTensors::deserialize(&self.0).unwrap().tensor(name).unwrap().shape()[..]
        else {
            panic!("{name} is not a matrix");
        };
        (rows, cols)
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.0).unwrap();
        let tensor = file.tensor(name).unwrap();
        let halves = tensor.data().as_chunks::<2>().0.iter();
        match tensor.dtype() {
            Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::BF16 => halves.map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F16 => halves.map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// The weight that the tensors of the checkpoint describe.
    fn four_bit(&self, codebook: Codebook) -> FourBit {
        let kind = if codebook == Codebook::Nf4 { "nf4" } else { "fp4" };
        let state = self.bytes(&format!("weight.quant_state.bitsandbytes__{kind}"));
        let state: Value = serde_json::from_slice(&state).unwrap();
        let number = |key: &str| state[key].as_u64().unwrap() as usize;
        let scales = match state.get("nested_offset") {
            None => Scales::Plain(floats(self.floats("weight.absmax"))),
            Some(offset) => Scales::Nested {
                codes: bytes(self.bytes("weight.absmax")),
                map: floats(self.floats("weight.nested_quant_map")),
                absmax: floats(self.floats("weight.nested_absmax")),
                offset: offset.as_f64().unwrap() as f32,
                block: number("nested_blocksize"),
            },
        };
        let codes = bytes(self.bytes("weight"));
        assert_eq!(self.floats("weight.quant_map"), codebook.values());
        FourBit::new(self.shape("dequantized"), codebook, number("blocksize"), codes, scales).unwrap()
    }
}

fn bytes(values: Vec<u8>) -> Tensor {
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu).unwrap()
}

fn floats(values: Vec<f32>) -> Tensor {
    let len = values.len();
    Tensor::from_vec(values, len, &Device::Cpu).unwrap()
}

const FOUR_BIT: [(&str, Codebook); 11] = [
    ("nf4-odd", Codebook::Nf4),
    ("nf4-odd-nested", Codebook::Nf4),
    ("nf4-long-nested", Codebook::Nf4),
    ("nf4-f16-nested", Codebook::Nf4),
    ("nf4-extreme", Codebook::Nf4),
    ("nf4-extreme-nested", Codebook::Nf4),
    ("nf4-zero-nested", Codebook::Nf4),
    ("nf4-block-128", Codebook::Nf4),
    ("nf4-block-4096", Codebook::Nf4),
    ("fp4", Codebook::Fp4),
    ("fp4-nested", Codebook::Fp4),
];

#[test]
fn the_dynamic_map_matches_bitsandbytes() {
    assert_eq!(numbers::bits(&dynamic_map()), numbers::bits(&Golden::read("dynamic_map").floats("signed")));
}

#[test]
fn dequantizing_stored_weights_matches_bitsandbytes() {
    for (name, codebook) in FOUR_BIT {
        let golden = Golden::read(name);
        let found = golden.four_bit(codebook).dequantize().unwrap();
        assert_eq!(bits(&found), numbers::bits(&golden.floats("dequantized")), "{name}");
    }
    for name in ["int8", "int8-bf16"] {
        let golden = Golden::read(name);
        let codes = bytes(golden.bytes("weight")).reshape(golden.shape("weight")).unwrap();
        let found = Int8::new(codes, floats(golden.floats("SCB"))).unwrap().dequantize().unwrap();
        assert_eq!(bits(&found), numbers::bits(&golden.floats("dequantized")), "{name}");
    }
}

/// Codes that bitsandbytes gives to values about halfway between two codes: torch computes the
/// quotient of 127 and the largest value as a product with its reciprocal.
#[test]
fn int8_codes_of_values_between_two_codes_are_bitsandbytes() {
    for (largest, value, code) in [
        (0.323974609375_f64, 0.1619873046875_f64, 63_i8),
        (0.370361328125, -0.1851806640625, -63),
        (0.239990234375, 0.1199951171875, 64),
        (0.403076171875, -0.1253662109375, -39),
    ] {
        let weight = Int8::quantize(&[largest as f32, value as f32], (1, 2)).unwrap();
        assert_eq!(
            weight.codes().flatten_all().unwrap().to_vec1::<u8>().unwrap(),
            [127, code as u8],
            "{value}"
        );
    }
}

#[test]
fn quantizing_matches_bitsandbytes() {
    // Block sizes other than 64 can be read, but are never written.
    for (name, codebook) in FOUR_BIT.into_iter().filter(|(name, _)| !name.contains("block")) {
        let golden = Golden::read(name);
        let expected = golden.four_bit(codebook);
        let nested = matches!(expected.scales(), Scales::Nested { .. });
        let found =
            FourBit::quantize(&golden.floats("input"), golden.shape("input"), codebook, nested).unwrap();
        let codes = |weight: &FourBit| weight.codes().to_vec1::<u8>().unwrap();
        assert_eq!(codes(&found), codes(&expected), "{name}");
        match (found.scales(), expected.scales()) {
            (Scales::Plain(found), Scales::Plain(expected)) => {
                assert_eq!(bits(found), bits(expected), "{name}")
            }
            (
                Scales::Nested { codes, map, absmax, offset, block },
                Scales::Nested { codes: codes2, map: map2, absmax: absmax2, offset: offset2, block: block2 },
            ) => {
                assert_eq!((bits(map), block), (bits(map2), block2), "{name}");
                // torch adds the terms of the mean in another order and in f32.
                assert!(
                    (offset.to_bits() as i32 - offset2.to_bits() as i32).abs() <= 1,
                    "{name}: {offset} {offset2}"
                );
                let close = |a: f32, b: f32| (a - b).abs() <= 2.0 * f32::EPSILON * offset2.abs().max(b.abs());
                let values = |t: &Tensor| t.to_vec1::<f32>().unwrap();
                assert!(values(absmax).into_iter().zip(values(absmax2)).all(|(a, b)| close(a, b)), "{name}");
                let codes = [codes, codes2].map(|t| t.to_vec1::<u8>().unwrap());
                let apart: Vec<(&u8, &u8)> = codes[0].iter().zip(&codes[1]).filter(|(a, b)| a != b).collect();
                assert!(
                    apart.iter().all(|(a, b)| a.abs_diff(**b) == 1) && apart.len() <= 1,
                    "{name}: {apart:?}"
                );
            }
            _ => panic!("{name}: other scales"),
        }
    }
    for name in ["int8", "int8-bf16"] {
        let golden = Golden::read(name);
        let found = Int8::quantize(&golden.floats("input"), golden.shape("input")).unwrap();
        assert_eq!(bits(found.scales()), numbers::bits(&golden.floats("SCB")), "{name}");
        let codes: Vec<u8> = found.codes().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(codes, golden.bytes("weight"), "{name}");
    }
}

/// The same weight in each quantized format, each with its dequantized matrix.
fn quantized(rows: usize, cols: usize) -> Vec<(String, Weight, Tensor)> {
    let values = random(rows * cols, 7);
    let mut all = Vec::new();
    for (codebook, nested) in [(Codebook::Nf4, false), (Codebook::Nf4, true), (Codebook::Fp4, true)] {
        let weight = FourBit::quantize(&values, (rows, cols), codebook, nested).unwrap();
        let dense = weight.dequantize().unwrap();
        all.push((format!("{codebook:?} nested {nested}"), Weight::FourBit(weight), dense));
    }
    let weight = Int8::quantize(&values, (rows, cols)).unwrap();
    let dense = weight.dequantize().unwrap();
    all.push(("int8".into(), Weight::Int8(weight), dense));
    all
}

#[test]
fn products_match_the_dequantized_matrix() {
    // Rows that begin in the middle of a block and of a byte; the last case is processed in three
    // panels.
    for (tokens, in_features, out_features) in [(1, 1, 1), (3, 5, 7), (17, 64, 33), (3, 999, 2500)] {
        let bias = vector(out_features, 2);
        for (what, weight, dense) in quantized(out_features, in_features) {
            let what = format!("{what} {tokens} x {in_features} x {out_features}");
            let layer = FrozenLinear::new(weight, Some(bias.clone())).unwrap();
            let dense = FrozenLinear::new(Weight::Dense(dense), Some(bias.clone())).unwrap();
            let (x, dy) = (matrix((tokens, in_features), 3), matrix((tokens, out_features), 4));
            let expected = dense.forward(&x).unwrap();
            assert_eq!(bits(&layer.forward(&x).unwrap()), bits(&expected), "{what}");
            let expected = wide(&dense.backward(&dy).unwrap());
            assert_close(&what, &layer.backward(&dy).unwrap(), &expected, 1e-6);
            let sum = x.copy().unwrap();
            layer.backward_add(&dy, &sum).unwrap();
            let expected: Vec<f64> = expected.iter().zip(wide(&x)).map(|(e, x)| e + x).collect();
            assert_close(&what, &sum, &expected, 1e-6);
        }
    }
}

#[test]
fn the_quantization_error_is_bounded() {
    let values = random(64 * 256, 9);
    let error = |dequantized: Tensor| {
        let dequantized: Vec<f32> = dequantized.flatten_all().unwrap().to_vec1().unwrap();
        let pairs = values.iter().zip(dequantized);
        pairs.fold(0.0_f32, |worst, (value, held)| worst.max((value - held).abs()))
    };
    let nf4 =
        |nested| FourBit::quantize(&values, (64, 256), Codebook::Nf4, nested).unwrap().dequantize().unwrap();
    // NF4: half of the widest gap between two codes, which is 0.304. int8: half of 2 / 254.
    assert!((0.14..0.1521).contains(&error(nf4(false))), "{}", error(nf4(false)));
    assert!((0.14..0.16).contains(&error(nf4(true))), "{}", error(nf4(true)));
    let int8 = error(Int8::quantize(&values, (64, 256)).unwrap().dequantize().unwrap());
    assert!((0.0035..0.0042).contains(&int8), "{int8}");
}

#[test]
fn invalid_weights_are_rejected() {
    let refused = |values: &[f32]| {
        let nf4 = FourBit::quantize(values, (2, 3), Codebook::Nf4, true).unwrap_err().to_string();
        let int8 = Int8::quantize(values, (2, 3)).unwrap_err().to_string();
        (nf4, int8)
    };
    let (nf4, int8) = refused(&[0.0, 1.0, 2.0, 3.0, f32::NAN, 5.0]);
    for error in [nf4, int8] {
        assert!(error.contains("element (1, 1) is NaN"), "{error}");
    }
    assert!(refused(&[f32::INFINITY, 1.0, 2.0, 3.0, 4.0, 5.0]).0.contains("element (0, 0) is inf"));
    let large = Int8::quantize(&[1e6; 6], (2, 3)).unwrap_err().to_string();
    assert!(large.contains("too large for f16"), "{large}");

    let new = |elements: usize, block: usize, scales: Tensor| {
        let result =
            FourBit::new((2, 33), Codebook::Nf4, block, bytes(vec![0; elements]), Scales::Plain(scales));
        result.map(|_| String::new()).unwrap_or_else(|e| e.to_string())
    };
    assert!(new(33, 64, vector(2, 1)).is_empty());
    assert!(new(33, 48, vector(2, 1)).contains("a block of 48 elements"));
    assert!(new(32, 64, vector(2, 1)).contains("the codes of U8 [32] should be U8 [33]"));
    assert!(new(33, 64, vector(3, 1)).contains("absmax of F32 [3] should be F32 [2]"));
    assert!(new(33, 64, floats(vec![1.0, f32::NAN])).contains("not finite"));
    let int8 = Int8::new(bytes(vec![0; 6]).reshape((2, 3)).unwrap(), vector(3, 1)).unwrap_err().to_string();
    assert!(int8.contains("SCB of F32 [3] should be F32 [2]"), "{int8}");
    let wrong = vector(6, 1).to_dtype(DType::F64).unwrap().reshape((2, 3)).unwrap();
    assert!(Int8::new(wrong, vector(2, 1)).is_err());
}

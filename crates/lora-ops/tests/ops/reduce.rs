//! Sums, fingerprints and copies over long vectors.

use candle_core::{DType, Device, Tensor};
use half::bf16;
use lora_ops::add_assign;
use lora_ops::pointwise::{round_into, zero};
use lora_ops::reduce::{fingerprint, scale, sum_of_squares};

use crate::common::{random, vector, wide};

fn of(values: &[f32]) -> Tensor {
    Tensor::new(values, &Device::Cpu).unwrap()
}

#[test]
fn sums_and_scalings_cover_long_vectors() {
    let x = vector(100_003, 1);
    let before = wide(&x);
    let exact: f64 = before.iter().map(|x| x.powi(2)).sum();
    assert!((sum_of_squares(&x).unwrap() - exact).abs() < 1e-6 * exact);
    assert_eq!(sum_of_squares(&of(&[])).unwrap(), 0.0);
    scale(&x, 0.5).unwrap();
    assert!(wide(&x).iter().zip(&before).all(|(x, b)| *x == b * 0.5));
    lora_ops::update_f32(&x, &[]).unwrap()[70_000] = f32::NAN;
    assert!(!sum_of_squares(&x).unwrap().is_finite());

    let (a, b) = (vector(30_000, 1), vector(30_000, 2));
    let expected: Vec<f64> =
        random(30_000, 1).iter().zip(random(30_000, 2)).map(|(a, b)| f64::from(a + b)).collect();
    add_assign(&a, &b).unwrap();
    assert_eq!(wide(&a), expected);
    zero(&a).unwrap();
    assert!(wide(&a).iter().all(|a| *a == 0.0));
}

#[test]
fn copies_are_rounded_to_the_nearest() {
    // Between 1 and the next bf16, which is 1 + 2^-7: ties go to the even number.
    let from = of(&[1.0, 1.0 + 0.3 / 128.0, 1.0 + 0.5 / 128.0, 1.0 + 1.5 / 128.0, -3e38, f32::INFINITY]);
    let to = of(&[0.0; 6]).to_dtype(DType::BF16).unwrap();
    round_into(&from, &to).unwrap();
    let expected = [1.0, 1.0, 1.0, 1.0 + 2.0 / 128.0, -3e38, f32::INFINITY].map(bf16::from_f32);
    assert_eq!(to.to_vec1::<bf16>().unwrap(), expected);
    let to = of(&[0.0; 6]);
    round_into(&from, &to).unwrap();
    assert_eq!(wide(&to), wide(&from));
}

/// The definition, element by element.
fn hash(values: &[f32], key: u64) -> u64 {
    values.iter().enumerate().fold(values.len() as u64, |sum, (i, x)| {
        let z = (u64::from(x.to_bits()) << 32 ^ i as u64) ^ key;
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        sum.wrapping_add(z ^ (z >> 31))
    })
}

#[test]
fn fingerprint_matches_its_definition_and_depends_on_every_bit_and_position() {
    let values = random(50_001, 1);
    let want = [hash(&values, 0x243f_6a88_85a3_08d3), hash(&values, 0x1319_8a2e_0370_7344)];
    let print = |values: &[f32]| fingerprint(&[&of(values)]).unwrap();
    assert_eq!(print(&values), want);
    let parts = [&values[..1], &values[1..20_000], &[], &values[20_000..]].map(of);
    assert_eq!(fingerprint(&parts.each_ref()).unwrap(), want);

    let changed = |change: &dyn Fn(&mut Vec<f32>)| {
        let mut values = values.clone();
        change(&mut values);
        let got = print(&values);
        assert!(got[0] != want[0] && got[1] != want[1]);
    };
    changed(&|v| v[40_000] = f32::from_bits(v[40_000].to_bits() ^ 1));
    changed(&|v| v[3] = -v[3]);
    changed(&|v| v.swap(7, 49_999));
    changed(&|v| v.push(0.0));
    changed(&|v| v.truncate(50_000));
    assert_ne!(print(&[0.0]), print(&[-0.0]));
}

#[test]
fn u8_and_f32_of_equal_bits_have_the_same_fingerprint() {
    let bytes: Vec<u8> = (0..40_000_u32).map(|i| (i * 7 % 256) as u8).collect();
    let bits: Vec<f32> = bytes.iter().map(|byte| f32::from_bits((*byte).into())).collect();
    let bytes = Tensor::new(bytes, &Device::Cpu).unwrap();
    let after = vector(10, 1);
    assert_eq!(fingerprint(&[&bytes, &after]).unwrap(), fingerprint(&[&of(&bits), &after]).unwrap());
}

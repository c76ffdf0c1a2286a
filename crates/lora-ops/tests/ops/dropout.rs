//! The mask of dropout.

use candle_core::{DType, Device, Tensor};
use lora_ops::dropout::Dropout;

use crate::common::{matrix, places, wide};

fn mask(seed: u64, module: &str, step: u64, tokens: &[(u32, u32)], features: usize) -> Vec<f64> {
    let dropout = Dropout::new(seed, module, step, 0.25, places(tokens));
    let ones = Tensor::ones((tokens.len(), features), DType::F32, &Device::Cpu).unwrap();
    wide(&dropout.apply(&ones).unwrap())
}

#[test]
fn kept_elements_are_scaled_and_the_dropped_share_is_the_probability() {
    let tokens: Vec<(u32, u32)> = (0..200).map(|t| (t / 50, t % 50)).collect();
    let mask = mask(1, "a", 2, &tokens, 501);
    let dropped = mask.iter().filter(|m| **m == 0.0).count() as f64 / mask.len() as f64;
    assert!((dropped - 0.25).abs() < 0.006, "{dropped} dropped");
    assert!(mask.iter().all(|m| *m == 0.0 || (m - 1.0 / 0.75).abs() < 1e-6));
}

#[test]
fn masks_do_not_depend_on_the_position_in_the_batch() {
    let features = 37;
    let whole = mask(1, "a", 2, &[(0, 0), (0, 1), (7, 0), (7, 1)], features);
    let moved = mask(1, "a", 2, &[(7, 1), (0, 0)], features);
    assert_eq!(moved[..features], whole[3 * features..]);
    assert_eq!(moved[features..], whole[..features]);
    for other in [
        mask(2, "a", 2, &[(0, 0)], features),
        mask(1, "b", 2, &[(0, 0)], features),
        mask(1, "a", 3, &[(0, 0)], features),
        mask(1, "a", 2, &[(1, 0)], features),
        mask(1, "a", 2, &[(0, 1)], features),
    ] {
        assert_ne!(other[..], whole[..features]);
    }
}

#[test]
fn the_mask_is_the_same_forward_and_backward() {
    let dropout = Dropout::new(1, "a", 0, 0.5, places(&[(0, 0), (0, 1)]));
    let (x, dy) = (matrix((2, 30), 1), matrix((2, 30), 2));
    let (y, dx) = (wide(&dropout.apply(&x).unwrap()), wide(&dropout.apply(&dy).unwrap()));
    assert!(y.iter().zip(&dx).all(|(y, dx)| (*y == 0.0) == (*dx == 0.0)));
}

#[test]
fn probability_zero_changes_nothing() {
    let x = matrix((2, 30), 1);
    let dropout = Dropout::new(1, "a", 0, 0.0, places(&[(0, 0), (0, 1)]));
    assert_eq!(wide(&dropout.apply(&x).unwrap()), wide(&x));
}

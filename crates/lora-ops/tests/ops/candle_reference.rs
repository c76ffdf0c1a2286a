//! Forward passes, compared with those of candle-nn.

use candle_core::{DType, Device, Tensor};
use candle_nn::ops::{silu, softmax_last_dim};
use candle_nn::rotary_emb;
use lora_ops::attention::{self, AttentionShape};
use lora_ops::glu;
use lora_ops::norm::{self, NormParams};
use lora_ops::rope::RopeTable;
use lora_spec::{ActivationFunction, NormKind, Rope};

use crate::common::{assert_close, matrix, vector, wide};

#[test]
fn rms_norm_matches_candle() {
    let (x, w) = (matrix((9, 48), 1), vector(48, 2));
    let expected = candle_nn::ops::rms_norm(&x, &w, 1e-5).unwrap();
    let params = NormParams { kind: NormKind::Rms, weight: &w, bias: None, eps: 1e-5 };
    assert_close("norm", &norm::forward(&x, params).unwrap().0, &wide(&expected), 1e-6);
}

#[test]
fn gated_activations_match_candle() {
    let (gate, up) = (matrix((9, 48), 1), matrix((9, 48), 2));
    let expected = (silu(&gate).unwrap() * &up).unwrap();
    let y = glu::forward(&gate, &up, ActivationFunction::Silu).unwrap();
    assert_close("activation", &y, &wide(&expected), 1e-6);
    let expected = (gate.gelu().unwrap() * &up).unwrap();
    let y = glu::forward(&gate, &up, ActivationFunction::GeluTanh).unwrap();
    assert_close("activation", &y, &wide(&expected), 1e-6);
}

#[test]
fn rotary_embedding_matches_candle() {
    let (batch, seq, heads, head_dim, theta) = (2, 11, 3, 16, 10_000.0_f64);
    let half = head_dim / 2;
    let angles: Vec<f32> = (0..seq * half)
        .map(|i| (i / half) as f32 * (1.0 / theta.powf((2 * (i % half)) as f64 / head_dim as f64)) as f32)
        .collect();
    let angles = Tensor::from_vec(angles, (seq, half), &Device::Cpu).unwrap();
    let x = matrix((batch * seq, heads * head_dim), 1);
    // candle's layout is [batch, heads, seq, head_dim].
    let by_head =
        x.reshape((batch, seq, heads, head_dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap();
    let expected = rotary_emb::rope(&by_head, &angles.cos().unwrap(), &angles.sin().unwrap()).unwrap();
    let expected = expected.transpose(1, 2).unwrap().contiguous().unwrap();
    let rope = Rope::new(theta, head_dim);
    let table = RopeTable::new(&rope, seq, &Device::Cpu).unwrap();
    table.forward(&x, seq, 0).unwrap();
    assert_close("rotation", &x, &wide(&expected), 1e-6);
}

#[test]
fn attention_matches_candle_masked_softmax() {
    let (batch, seq, heads, kv_heads, head_dim) = (2, 150, 6, 2, 8);
    let shape = AttentionShape::new(batch, seq, heads, kv_heads, head_dim);
    let q = matrix((batch * seq, heads * head_dim), 1);
    let (k, v) =
        (matrix((batch * seq, kv_heads * head_dim), 2), matrix((batch * seq, kv_heads * head_dim), 3));
    let by_head = |x: &Tensor, n: usize| {
        x.reshape((batch, seq, n, head_dim)).unwrap().transpose(1, 2).unwrap().contiguous().unwrap()
    };
    let repeated = |x: &Tensor| {
        let x = by_head(x, kv_heads).unsqueeze(2).unwrap();
        let x = x.expand((batch, kv_heads, heads / kv_heads, seq, head_dim)).unwrap();
        x.contiguous().unwrap().reshape((batch, heads, seq, head_dim)).unwrap()
    };
    let mask: Vec<f32> =
        (0..seq * seq).map(|i| if i % seq > i / seq { f32::NEG_INFINITY } else { 0.0 }).collect();
    let mask = Tensor::from_vec(mask, (1, 1, seq, seq), &Device::Cpu).unwrap();
    let scores =
        by_head(&q, heads).matmul(&repeated(&k).transpose(2, 3).unwrap().contiguous().unwrap()).unwrap();
    let scores = (scores / (head_dim as f64).sqrt()).unwrap().broadcast_add(&mask).unwrap();
    let expected = softmax_last_dim(&scores).unwrap().matmul(&repeated(&v)).unwrap();
    let expected = expected.transpose(1, 2).unwrap().contiguous().unwrap().to_dtype(DType::F64).unwrap();
    assert_close(
        "attention",
        &attention::forward(&q, &k, &v, shape, None).unwrap().0,
        &wide(&expected),
        2e-6,
    );
}

//! Shapes and types that do not fit are rejected with an error.

use candle_core::{DType, Device, Tensor};
use lora_ops::adamw::{self, AdamWSettings, AdamWTensors};
use lora_ops::attention::{self, AttentionShape};
use lora_ops::cross_entropy::{self, Targets};
use lora_ops::dropout::Dropout;
use lora_ops::gemm::{no_trans, product, trans};
use lora_ops::linear::FrozenLinear;
use lora_ops::lora::{self, LoraPair};
use lora_ops::norm::{self, NormParams};
use lora_ops::pointwise::round_into;
use lora_ops::rope::RopeTable;
use lora_ops::{Ids, Result, add_assign, embedding, glu, read_f32, update_f32};
use lora_spec::{ActivationFunction, NormKind, Rope, RopeScaling};

use crate::common::{ids, matrix, places, vector};

fn assert_error<T>(what: &str, result: Result<T>, part: &str) {
    let Err(error) = result else { panic!("{what} was accepted") };
    assert!(error.to_string().contains(part), "{what}: {error}");
}

#[test]
fn norms_activations_and_sums() {
    let x = matrix((4, 6), 1);
    let (weight, narrow) = (vector(6, 1), vector(5, 1));
    let rms = NormParams { kind: NormKind::Rms, weight: &weight, bias: None, eps: 1e-5 };
    let layer = NormParams { kind: NormKind::Layer, ..rms };
    assert_error("norm", norm::forward(&x, NormParams { weight: &narrow, ..rms }).map(|_| ()), "6 features");
    let bias = NormParams { bias: Some(&narrow), ..layer };
    assert_error("bias", norm::forward(&x, bias).map(|_| ()), "[5] for 6 features");
    let (_, saved) = norm::forward(&x, rms).unwrap();
    let (dy, other) = (matrix((3, 6), 1), matrix((5, 6), 1));
    assert_error("norm's gradient", norm::backward(&saved, &x, rms, &dy, None), "[3, 6]");
    assert_error("another input's norm", norm::recompute(&saved, &other, rms), "5 tokens");
    assert_error("another input's norm", norm::backward(&saved, &other, rms, &other, None), "5 tokens");
    assert_error("another kind of norm", norm::recompute(&saved, &x, layer), "another kind of norm");
    assert_error("residual gradient", norm::backward(&saved, &x, rms, &x, Some(&dy)), "residual [3, 6]");
    assert_error("norm's residual", norm::add_forward(&x, &dy, rms).map(|_| ()), "residual [3, 6]");
    let (none, no_weight) = (Tensor::zeros((4, 0), DType::F32, &Device::Cpu).unwrap(), vector(0, 1));
    let of_nothing = NormParams { weight: &no_weight, ..rms };
    assert_error("norm of nothing", norm::forward(&none, of_nothing).map(|_| ()), "0 features");
    assert_error("activation alone", glu::activation_backward(&x, &dy, ActivationFunction::Silu), "[3, 6]");
    assert_error("activation", glu::forward(&x, &dy, ActivationFunction::Silu), "[3, 6]");
    assert_error("activation's gradient", glu::backward(&x, &x, &dy, ActivationFunction::Silu), "[3, 6]");
    assert_error("sum", add_assign(&x, &dy), "[3, 6]");
    assert_error("copy", round_into(&x, &dy), "[3, 6]");
    assert_error("copy", round_into(&x.to_dtype(DType::F64).unwrap(), &x), "F64");
}

#[test]
fn tensors_that_are_not_contiguous_f32() {
    let x = matrix((4, 6), 1);
    assert_error("transpose", read_f32(&x.t().unwrap()), "contiguous");
    assert_error("transpose", update_f32(&x.t().unwrap(), &[]), "contiguous");
    let double = x.to_dtype(DType::F64).unwrap();
    assert!(read_f32(&double).is_err());
    assert_error("f64", update_f32(&double, &[]), "f32");
    assert!(glu::forward(&double, &double, ActivationFunction::Silu).is_err());
    assert!(add_assign(&x, &double).is_err());
}

/// Each of these operations would otherwise wait for a lock that it holds itself.
#[test]
fn updated_tensors_that_share_their_storage_with_another_operand() {
    let x = matrix((6, 6), 1);
    let (top, bottom) = (x.narrow(0, 0, 3).unwrap(), x.narrow(0, 3, 3).unwrap());
    let y = matrix((6, 6), 2);
    assert_error("sum", add_assign(&x, &x), "shares its storage");
    assert_error("sum of views", add_assign(&top, &bottom), "shares its storage");
    assert_error("product", product(1.0, no_trans(&y), no_trans(&x), 0.0, &x), "shares its storage");
    let linear = FrozenLinear::new(x.clone(), None).unwrap();
    assert_error("gradient", linear.backward_add(&y, &y), "shares its storage");
    assert_error("gradient", linear.backward_add(&y, &x), "shares its storage");
    let adamw = AdamWSettings { beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.0 };
    let (v, gradient) = (vector(6, 1), vector(6, 2));
    let state = AdamWTensors { params: &v, m: &gradient, v: &v };
    assert_error(
        "moments",
        adamw::step(&adamw.coefficients(0.1, 1, 1.0), state, &gradient),
        "shares its storage",
    );
    // No lock is held after an error, and two operands may read one storage.
    product(1.0, no_trans(&y), trans(&y), 0.0, &x).unwrap();
    add_assign(&x, &y).unwrap();
}

#[test]
fn rotary_embedding() {
    let table = |rotary_dim, head_dim| {
        RopeTable::new(&Rope { rotary_dim, ..Rope::new(1e4, head_dim) }, 5, &Device::Cpu).map(|_| ())
    };
    assert_error("odd heads", table(3, 3), "3 of 3 features");
    assert_error("more features than a head has", table(6, 4), "6 of 4 features");
    assert_error("no features", table(0, 4), "0 of 4 features");
    let scaling = RopeScaling::LongRope {
        short_factor: vec![1.0],
        long_factor: vec![1.0, 2.0],
        original_max_position_embeddings: 8.0,
        attention_factor: 1.0,
    };
    let rope = Rope { scaling, ..Rope::new(1e4, 4) };
    let table = |positions| RopeTable::new(&rope, positions, &Device::Cpu).map(|_| ());
    assert_error("divisors", table(8), "1 divisors of 2 frequencies");
    assert!(table(9).is_ok());
    let table = RopeTable::new(&Rope::new(1e4, 4), 5, &Device::Cpu).unwrap();
    assert!(table.forward(&matrix((5, 8), 1), 5, 0).is_ok());
    assert_error("width", table.forward(&matrix((5, 6), 1), 5, 0), "[5, 6]");
    assert_error("positions", table.forward(&matrix((5, 8), 1), 5, 1), "position 1");
    assert_error("positions", table.backward(&matrix((6, 8), 1), 6), "position 0");
    assert_error("no positions", table.forward(&matrix((5, 8), 1), 0, 0), "[5, 8]");
}

#[test]
fn attention_shapes() {
    let shape = AttentionShape {
        batch: 1,
        seq: 4,
        kv_seq: 4,
        heads: 2,
        kv_heads: 1,
        head_dim: 3,
        scale: 0.5,
        softcap: None,
    };
    let (q, k) = (matrix((4, 6), 1), matrix((4, 3), 2));
    let (output, saved) = attention::forward(&q, &k, &k, shape, None).unwrap();
    let wrong = [
        AttentionShape { batch: 2, ..shape },
        AttentionShape { kv_seq: 3, ..shape },
        AttentionShape { heads: 3, ..shape },
        AttentionShape { kv_heads: 0, ..shape },
        AttentionShape { head_dim: 0, ..shape },
        AttentionShape { batch: usize::MAX, ..shape },
    ];
    for wrong in wrong {
        assert_error("shape", attention::forward(&q, &k, &k, wrong, None).map(|_| ()), "attention");
    }
    assert_error("values", attention::forward(&q, &k, &matrix((3, 3), 1), shape, None).map(|_| ()), "[3, 3]");
    let d_output = matrix((4, 5), 1);
    let backward =
        |saved, d_output, shape| attention::backward(saved, (&q, &k, &k), &output, d_output, shape, None);
    assert!(backward(&saved, &output, shape).is_ok());
    assert_error("gradient", backward(&saved, &d_output, shape), "[4, 5]");
    // Activations of a shorter sequence.
    let (_, other) = attention::forward(
        &matrix((2, 6), 1),
        &matrix((2, 3), 1),
        &matrix((2, 3), 1),
        AttentionShape { seq: 2, kv_seq: 2, ..shape },
        None,
    )
    .unwrap();
    assert_error("another call's", backward(&other, &output, shape), "attention");
    let first = |keys: &[u32]| {
        let first = Ids::new(keys, &Device::Cpu).unwrap();
        attention::forward(&q, &k, &k, shape, Some(&first)).map(|_| ())
    };
    assert!(first(&[0, 0, 2, 3]).is_ok());
    assert_error("too few first keys", first(&[0; 3]), "first keys of 3 queries");
    assert_error("a later key", first(&[0, 2, 2, 2]), "query 1 of sequence 0 sees the keys 2 to 1");
    assert_error("back", first(&[0, 1, 0, 0]), "query 2 of sequence 0");
}

#[test]
fn linear_layers() {
    let weight = matrix((5, 4), 1);
    assert_error("bias", FrozenLinear::new(weight.clone(), Some(vector(4, 1))), "bias of 5");
    assert_error("type", FrozenLinear::new(weight.to_dtype(DType::F16).unwrap(), None), "F16");
    let layer = FrozenLinear::new(weight.clone(), None).unwrap();
    assert_error("input", layer.forward(&matrix((3, 5), 1)), "4 features");
    assert_error("gradient", layer.backward(&matrix((3, 4), 1)), "[3, 4]");
    assert_error("sum", layer.backward_add(&matrix((3, 5), 1), &matrix((2, 4), 1)), "[2, 4]");
    let transposed = FrozenLinear::new(weight.t().unwrap(), None).unwrap();
    assert_error("transpose", transposed.forward(&matrix((3, 5), 1)), "contiguous");
}

#[test]
fn lora_matrices() {
    let pair = |a, b| LoraPair { a: matrix(a, 1), b: matrix(b, 2) };
    let (x, y) = (matrix((3, 4), 1), matrix((3, 5), 1));
    let good = pair((2, 4), (5, 2));
    let saved = lora::forward(&x, &good, 1.0, None, &y).unwrap();
    assert_error("A", lora::forward(&x, &pair((2, 3), (5, 2)), 1.0, None, &y), "4 features");
    assert_error("rank", lora::forward(&x, &pair((2, 4), (5, 3)), 1.0, None, &y), "4 features");
    assert_error("output", lora::forward(&x, &good, 1.0, None, &x), "[3, 5]");
    let dropout = Dropout::new(1, "m", 1, 0.5, places(&[(0, 0)]));
    assert_error("mask", lora::forward(&x, &good, 1.0, Some(&dropout), &y), "1 tokens");
    let backward = |saved, x: &Tensor, dy: &Tensor, grad: &LoraPair, dx: Option<&Tensor>| {
        lora::backward(saved, x, &good, 1.0, None, dy, grad, dx)
    };
    let grad = pair((2, 4), (5, 2));
    assert!(backward(&saved, &x, &y, &grad, Some(&x.copy().unwrap())).is_ok());
    assert_error("dy", backward(&saved, &x, &matrix((2, 5), 1), &grad, None), "[2, 5]");
    assert_error("x", backward(&saved, &matrix((2, 4), 1), &y, &grad, None), "[2, 4]");
    assert_error("gradient", backward(&saved, &x, &y, &pair((1, 4), (5, 1)), None), "[1, 4]");
    assert_error("dx", backward(&saved, &x, &y, &grad, Some(&matrix((3, 3), 1))), "[3, 3]");
}

#[test]
fn optimizer_state() {
    let adamw = AdamWSettings { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 };
    let [params, m, v, gradient, short] = [5, 5, 5, 5, 4].map(|n| vector(n, 1));
    let step = |v: &Tensor, gradient: &Tensor| {
        let state = AdamWTensors { params: &params, m: &m, v };
        adamw::step(&adamw.coefficients(1e-3, 1, 1.0), state, gradient)
    };
    assert!(step(&v, &gradient).is_ok());
    assert_error("moments", step(&short, &gradient), "5 parameters");
    assert_error("gradient", step(&v, &short), "5 parameters");
}

#[test]
fn cross_entropy_and_embedding() {
    let (x, head) = (matrix((3, 4), 1), matrix((10, 4), 1));
    let run = |x: &Tensor, head: &Tensor, tokens: &[u32], weights: &[f32]| {
        let targets = Targets::new(tokens, weights, x.device())?;
        cross_entropy::forward_backward(x, head, &targets, true).map(|_| ())
    };
    assert_error("features", run(&matrix((3, 5), 1), &head, &[0; 3], &[1.0; 3]), "[10, 4]");
    assert_error("targets", run(&x, &head, &[0; 2], &[1.0; 2]), "2 targets");
    assert_error("weights", run(&x, &head, &[0; 3], &[1.0; 2]), "2 weights");
    assert_error("vocabulary", run(&x, &head, &[0, 10, 0], &[1.0; 3]), "target 10");
    assert_error("type", run(&x, &head.to_dtype(DType::F64).unwrap(), &[0; 3], &[1.0; 3]), "F64");
    let none = Tensor::zeros((0, 4), DType::F32, &Device::Cpu).unwrap();
    assert_error("no vocabulary", run(&x, &none, &[0; 3], &[1.0; 3]), "vocabulary of 0");
    assert_error("token", embedding::forward(&head, &ids(&[3, 10])), "token 10");
    assert_error("type", embedding::forward(&head.to_dtype(DType::F64).unwrap(), &ids(&[3])), "F64");
}

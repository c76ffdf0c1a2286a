//! The plan of a job.

use lora_plan::{MemoryEstimate, Plan, PlanData};

use crate::v1;

impl From<Plan> for v1::PlanJobResponse {
    /// Converts the plan. `all_reduce_bytes` is not part of a plan and is set to 0.
    fn from(plan: Plan) -> Self {
        Self {
            base_parameters: plan.base_parameters,
            trainable_parameters: plan.trainable_parameters,
            adapter_bytes: plan.adapter_bytes,
            modules: plan.modules.into_iter().map(|(name, n)| (name, n as u64)).collect(),
            total_steps: plan.total_steps,
            steps_per_epoch: plan.steps_per_epoch,
            warmup_steps: plan.warmup_steps,
            micro_batches: plan.micro_batches as u64,
            tokens: plan.tokens,
            padding: plan.padding,
            padding_unpacked: plan.padding_unpacked,
            padding_packed: plan.padding_packed,
            sample: plan.sample,
            notes: plan.notes,
            problems: plan.problems,
            flops: plan.flops,
            memory_cpu: Some(plan.memory.cpu.into()),
            memory_gpu: Some(plan.memory.gpu.into()),
            train: Some((&plan.train).into()),
            eval: plan.eval.as_ref().map(Into::into),
            all_reduce_bytes: 0,
        }
    }
}

impl From<&PlanData> for v1::PlanData {
    fn from(data: &PlanData) -> Self {
        let report = &data.report;
        Self {
            rows_read: report.rows_read as u64,
            rows_kept: report.rows_kept as u64,
            dropped: report.dropped as u64,
            without_targets: report.without_targets as u64,
            truncated: report.truncated as u64,
            tokens: report.tokens,
            trained_tokens: report.trained_tokens,
            shortest: report.shortest as u64,
            median: report.median as u64,
            percentile_95: report.percentile_95 as u64,
            longest: report.longest as u64,
        }
    }
}

impl From<MemoryEstimate> for v1::WorkerMemory {
    fn from(memory: MemoryEstimate) -> Self {
        let MemoryEstimate { base, adapter, moments, gradients, activations, workspace, peak } = memory;
        Self { base, adapter, moments, gradients, activations, workspace, peak }
    }
}

//! The report as text.

use std::fmt::Write;
use std::path::Path;

use lora_train::{AllReduceMeasurement, DeviceMeasurement};
use lora_worker::probe::ProbeReport;

use super::report::{CpuView, CudaView, GpuView, LibraryView, Report};
use crate::output::{Table, bytes};

impl Report {
    /// The report as a table of names and values, and a list of problems with their remedies.
    pub(crate) fn text(&self) -> String {
        let mut table = Table::new();
        let CpuView { threads, reading } = &self.cpu;
        table.row("CPU", format!("{threads} threads, {}\n{}", reading.device, rates(reading, "f32")));
        let Some(cuda) = &self.cuda else { return table.to_string() };
        add_cuda_rows(&mut table, cuda);
        let mut text = table.to_string();
        if !cuda.problems.is_empty() {
            text += "\n\nproblems that prevent training on GPUs:";
        }
        for problem in &cuda.problems {
            let remedy = problem.remedy.replace('\n', "\n    ");
            // Writing to a `String` does not fail.
            let _ = write!(text, "\n- {}\n    {remedy}", problem.what);
        }
        text
    }
}

fn add_cuda_rows(table: &mut Table, cuda: &CudaView) {
    let driver = cuda.driver.as_ref().map(|driver| {
        let version = driver.version.as_deref().unwrap_or("unknown version");
        format!("{version}, for CUDA {}{}", driver.cuda, at(driver.path.as_deref()))
    });
    table.row("driver", driver.unwrap_or_else(|| "none".into()));
    for (number, gpu) in cuda.gpus.iter().enumerate() {
        table.row(format!("GPU {number}"), gpu_text(gpu));
    }
    if cuda.gpus.len() > 1 {
        table.row("peer-to-peer", peers(cuda));
    }
    for library in &cuda.libraries {
        table.row(library.name, library_text(library));
    }
    for worker in &cuda.workers {
        let build =
            worker.build.map_or("unknown build".into(), |build| format!("for {}", build.to_uppercase()));
        table.row("lora-worker", format!("{build}{}", at(Some(&worker.path))));
    }
    if cuda.workers.is_empty() {
        table.row("lora-worker", "none");
    }
    if let Some(AllReduceMeasurement { through, fallback, world_size, bytes: size, seconds }) =
        &cuda.all_reduce
    {
        // The least that each rank must send in an all-reduce.
        let sent = 2.0 * *size as f64 * (*world_size as f64 - 1.0) / *world_size as f64;
        let rate = sent / seconds / 1e9;
        let text =
            format!("{}, {world_size} workers over {through}: {rate:.1} GB/s sent by each", bytes(*size));
        let why = fallback.as_ref().map_or(String::new(), |why| format!("\n{why}"));
        table.row("all-reduce", text + &why);
    }
    table.row("CUDA", if cuda.works { "works" } else { "does not work" });
}

fn gpu_text(gpu: &GpuView) -> String {
    let GpuView { name, memory_bytes, compute_capability, reading } = gpu;
    let facts = format!("{name}, {}, compute capability {compute_capability}", bytes(*memory_bytes));
    let Some(ProbeReport { rates: read, gpu: seen }) = reading else { return facts };
    let free = seen.as_ref().map_or(String::new(), |seen| format!(", {} free", bytes(seen.free_bytes)));
    format!("{facts}\n{}{free}", rates(read, "bf16"))
}

fn rates(reading: &DeviceMeasurement, dtype: &str) -> String {
    let DeviceMeasurement { product_tflops, product_side, memory_gb_s, .. } = reading;
    let products = match product_tflops {
        1.0.. => format!("{product_tflops:.1} TFLOP/s"),
        _ => format!("{:.0} GFLOP/s", 1000.0 * product_tflops),
    };
    format!("{products} in {dtype} products of side {product_side}, {memory_gb_s:.0} GB/s of memory")
}

/// `all`, `none`, or the pairs: `0-1` if each GPU reaches the other one's memory, else `0>1`.
fn peers(cuda: &CudaView) -> String {
    let n = cuda.gpus.len();
    if cuda.peers.len() == n * (n - 1) {
        return "all".into();
    }
    let mutual = |(one, other): (usize, usize)| cuda.peers.contains(&(other, one));
    let shown = cuda.peers.iter().filter(|(one, other)| one < other || !mutual((*one, *other)));
    let pairs: Vec<String> =
        shown.map(|pair| format!("{}{}{}", pair.0, if mutual(*pair) { '-' } else { '>' }, pair.1)).collect();
    if pairs.is_empty() { "none".into() } else { pairs.join(" ") }
}

fn library_text(library: &LibraryView) -> String {
    let version = library.version.as_deref().unwrap_or("unknown version");
    match library {
        LibraryView { loads: true, path, .. } => format!("{version}{}", at(path.as_deref())),
        LibraryView { needed: true, .. } => "none".into(),
        LibraryView { .. } => "none; not needed for training".into(),
    }
}

fn at(path: Option<&Path>) -> String {
    path.map_or(String::new(), |path| format!(", {}", path.display()))
}

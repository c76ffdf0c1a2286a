//! Compiles `proto/` without `protoc`.

use std::error::Error;
use std::path::Path;

use protox::prost::Message;

fn main() -> Result<(), Box<dyn Error>> {
    // Read at run time: a target directory may have this program from another checkout.
    let root = Path::new(&std::env::var("CARGO_MANIFEST_DIR")?).join("../../proto");
    println!("cargo::rerun-if-changed={}", root.display());
    let files = ["job", "fine_tuning", "worker", "artifacts"].map(|name| format!("lora/v1/{name}.proto"));
    let descriptors = protox::compile(files, [&root])?;
    let out = std::env::var("OUT_DIR")?;
    std::fs::write(Path::new(&out).join("lora.v1.descriptors"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure()
        .build_client(std::env::var_os("CARGO_FEATURE_CLIENT").is_some())
        .build_server(std::env::var_os("CARGO_FEATURE_SERVER").is_some())
        // The `connect` constructors of the transport would clash with the RPC `Connect`.
        .build_transport(false)
        .boxed("lora.v1.CoordinatorMessage.kind.directive")
        .type_attribute("lora.v1.StepMetrics", "#[derive(serde::Serialize)]")
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors)?;
    Ok(())
}

//! Compiles every operation's CUDA kernels (`src/**/*.cu`) if the feature `cuda` is on: to machine
//! code for the GPUs in `LORA_CUDA_ARCHS` (default `80,90,100`), and to PTX of the first of them,
//! which the driver translates for later GPUs.

use std::env;
use std::error::Error;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::SystemTime;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    println!("cargo::rerun-if-changed=src");
    for variable in ["LORA_CUDA_ARCHS", "CUDA_HOME", "CUDA_PATH", "NVCC"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let mut sources = Vec::new();
    let mut headers = Vec::new();
    find(Path::new("src"), &mut sources, &mut headers)?;
    sources.sort();
    // An image that is newer than its source, all headers and this file is not compiled again: most
    // changes are to other files.
    let newest_header = newest(&headers)?.max(newest(&["build.rs".into()])?);
    let archs = env::var("LORA_CUDA_ARCHS").unwrap_or_else(|_| "80,90,100".into());
    // One compiler per core: each runs on one thread, and cargo builds other crates at the same
    // time.
    let parallel: usize = env::var("NUM_JOBS").ok().and_then(|jobs| jobs.parse().ok()).unwrap_or(1).max(1);
    let recipe = format!("{} {archs}", nvcc().display());
    let recipe_file = out.join("recipe");
    let is_same_recipe = fs::read_to_string(&recipe_file).is_ok_and(|last| last == recipe);
    let mut stale = Vec::new();
    for source in &sources {
        let changed = newest(std::slice::from_ref(source))?.max(newest_header);
        let built = fs::metadata(image(&out, source)).and_then(|image| image.modified());
        if !is_same_recipe || built.map_or(true, |built| built <= changed) {
            stale.push(source);
        }
    }
    for batch in stale.chunks(parallel) {
        let running: Vec<(&PathBuf, Child)> = batch
            .iter()
            .map(|&source| Ok((source, compile(source, &image(&out, source), &archs)?)))
            .collect::<Result<_, Box<dyn Error>>>()?;
        for (source, child) in running {
            let output = child.wait_with_output()?;
            if !output.status.success() {
                return Err(format!("nvcc could not compile {}; see above", source.display()).into());
            }
        }
    }
    fs::write(recipe_file, recipe)?;
    let mut list = String::from("&[\n");
    for source in &sources {
        writeln!(list, "include_bytes!({:?}),", image(&out, source))?;
    }
    list.push(']');
    fs::write(out.join("images.rs"), list)?;
    Ok(())
}

fn find(dir: &Path, sources: &mut Vec<PathBuf>, headers: &mut Vec<PathBuf>) -> Result<(), Box<dyn Error>> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            find(&path, sources, headers)?;
            continue;
        }
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("cu") => sources.push(path),
            Some("cuh") => headers.push(path),
            _ => {}
        }
    }
    Ok(())
}

/// The latest modification time of `files`.
fn newest(files: &[PathBuf]) -> Result<SystemTime, Box<dyn Error>> {
    files
        .iter()
        .try_fold(SystemTime::UNIX_EPOCH, |newest, file| Ok(newest.max(fs::metadata(file)?.modified()?)))
}

fn image(out: &Path, source: &Path) -> PathBuf {
    out.join(source.file_stem().unwrap_or_default()).with_extension("fatbin")
}

fn compile(source: &Path, image: &Path, archs: &str) -> Result<Child, Box<dyn Error>> {
    let mut command = Command::new(nvcc());
    command.args(["-std=c++17", "-O3", "-fatbin", "-Isrc/cuda", "-Werror", "all-warnings"]);
    for (i, arch) in archs.split(',').map(str::trim).enumerate() {
        command.arg(format!("-gencode=arch=compute_{arch},code=sm_{arch}"));
        if i == 0 {
            command.arg(format!("-gencode=arch=compute_{arch},code=compute_{arch}"));
        }
    }
    command.arg(source).arg("-o").arg(image);
    command.spawn().map_err(|e| {
        format!(
            "cannot run {:?}: {e}; the feature `cuda` needs CUDA's compiler nvcc, on PATH, in NVCC or under \
             CUDA_HOME",
            nvcc()
        )
        .into()
    })
}

fn nvcc() -> PathBuf {
    if let Some(nvcc) = env::var_os("NVCC") {
        return nvcc.into();
    }
    let home = ["CUDA_HOME", "CUDA_PATH"].into_iter().find_map(env::var_os);
    home.map(|home| PathBuf::from(home).join("bin/nvcc"))
        .filter(|nvcc| nvcc.exists())
        .unwrap_or_else(|| "nvcc".into())
}

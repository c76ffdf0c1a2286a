//! Headers of safetensors files (<https://huggingface.co/docs/safetensors>): one file, or
//! shards with an index.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Seek};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::{
    BaseDtype, BaseFormat, FieldError, GIT_LFS_POINTER, ModelConfig, Quantization, SourceDir, SourceFile,
    file_names, is_git_lfs_pointer,
};

mod head;
mod quantized;

pub use quantized::{FOUR_BIT_BLOCK_SIZES, FourBitState, FourBitType, StoredWeight};

/// The safetensors files of a base and the location of every tensor in them.
#[derive(Debug, Clone)]
pub struct SafetensorsIndex {
    /// The safetensors files, sorted by name.
    pub files: Vec<SourceFile>,
    /// Tensors of the decoder and its head, by the names of Llama, whatever the file calls them.
    pub tensors: BTreeMap<String, TensorEntry>,
    /// Other tensors, such as those of a vision tower, by name.
    others: BTreeMap<String, TensorEntry>,
    /// What the file's names of the decoder's tensors have before `embed_tokens`.
    prefix: &'static str,
    /// The file's name of the head's weight.
    head: &'static str,
}

/// A tensor in a safetensors file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorEntry {
    /// Index into `SafetensorsIndex::files`.
    pub file: usize,
    /// safetensors' name of the element type, such as `BF16`.
    pub dtype: String,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Byte range of the elements in the file. They are little endian, in row-major order.
    pub bytes: Range<u64>,
}

/// An error in a safetensors file.
#[derive(Debug, thiserror::Error)]
#[error("{name}: {message}", name = name.display())]
pub struct SafetensorsError {
    /// Name of the file.
    pub name: PathBuf,
    /// Why the file is invalid, and what would be right.
    pub message: String,
}

/// What the names of a decoder's tensors begin with.
const PREFIX: &str = "model.";

/// Name of the head's weight.
const HEAD: &str = "lm_head.weight";

/// Maximum size of a header, as the format defines it.
const MAX_HEADER_BYTES: u64 = 100_000_000;

impl SafetensorsIndex {
    /// Reads the headers of `model.safetensors`, or of the shards that
    /// `model.safetensors.index.json` lists.
    ///
    /// # Errors
    /// A missing, unreadable or truncated file, or an invalid header.
    pub fn open(dir: &SourceDir) -> Result<Self, SafetensorsError> {
        let single = dir.file(file_names::MODEL_WEIGHTS);
        let index = dir.file(file_names::MODEL_WEIGHTS_INDEX);
        let files = if !single.is_absent() {
            vec![single]
        } else if !index.is_absent() {
            shards(&index, dir)?
        } else {
            let message = "contains neither model.safetensors nor model.safetensors.index.json".to_owned();
            return Err(SafetensorsError { name: dir.name().to_owned(), message });
        };
        let mut tensors = BTreeMap::new();
        for (index, file) in files.iter().enumerate() {
            tensors.extend(read_header(file, index)?);
        }
        Ok(Self::with_names_of_llama(files, tensors))
    }

    /// Finds out how the files name the decoder's tensors: as the class for text, as the bare model
    /// without a head, or as a class with a vision tower, before or since Transformers 4.52.
    fn with_names_of_llama(files: Vec<SourceFile>, stored: BTreeMap<String, TensorEntry>) -> Self {
        const PREFIXES: [&str; 5] =
            [PREFIX, "model.language_model.", "language_model.model.", "language_model.", ""];
        let has_decoder = |prefix: &&str| stored.contains_key(&format!("{prefix}embed_tokens.weight"));
        let prefix = PREFIXES.into_iter().find(has_decoder).unwrap_or(PREFIX);
        // The other name is that of another tower, or of a base whose names are mixed.
        let mut heads = [HEAD, "language_model.lm_head.weight"];
        if prefix.starts_with("language_model.") {
            heads.reverse();
        }
        let head = heads.into_iter().find(|head| stored.contains_key(*head)).unwrap_or(HEAD);
        let (mut tensors, mut others) = (BTreeMap::new(), BTreeMap::new());
        for (name, entry) in stored {
            match name.strip_prefix(prefix) {
                _ if name == head => tensors.insert(HEAD.to_owned(), entry),
                Some(rest) => tensors.insert(format!("{PREFIX}{rest}"), entry),
                None => others.insert(name, entry),
            };
        }
        Self { files, tensors, others, prefix, head }
    }

    /// Returns the name that the files give to a tensor of the decoder or the head.
    pub fn stored_name(&self, name: &str) -> String {
        match name.strip_prefix(PREFIX) {
            Some(rest) => format!("{}{rest}", self.prefix),
            None if name == HEAD => self.head.to_owned(),
            None => name.to_owned(),
        }
    }

    /// Iterates over the tensors that belong neither to the decoder nor to the head, such as those
    /// of a vision tower.
    pub fn other_tensors(&self) -> impl Iterator<Item = (&String, &TensorEntry)> {
        self.others.iter()
    }

    /// Checks that every tensor of `model` exists with its shape and with a type that can be
    /// loaded, and that the decoder has no other tensors.
    pub fn check(&self, model: &ModelConfig) -> Result<(), SafetensorsError> {
        let modules = model.linear_modules();
        for module in &modules {
            self.weight(module)?;
        }
        let is_weight = |name: &str| {
            let module = name.strip_suffix(".weight");
            module.is_some_and(|module| modules.iter().any(|m| m.name == module))
        };
        let tensors = model.tensors();
        let mut others = tensors.iter().filter(|(name, _)| !is_weight(name));
        others.try_for_each(|(name, shape)| self.check_dense(name, shape))?;
        let known: BTreeSet<&str> = tensors.iter().map(|(name, _)| name.as_str()).collect();
        let is_unknown = |name: &str| name != HEAD && !is_expected(name, &known) && !model.ignores(name);
        match self.tensors.iter().find(|(name, _)| is_unknown(name)) {
            Some((name, entry)) => Err(self
                .fail(entry, format!("tensor {name} is not part of the model that config.json describes"))),
            None => Ok(()),
        }
    }

    /// Returns the type of all dense matrices of `model` in a GPU's memory. With `auto` it is bf16
    /// if the files have no other floats, and otherwise f32.
    pub fn gpu_dtype(&self, model: &ModelConfig, dtype: BaseDtype) -> BaseDtype {
        let is_bf16 = |(name, _): (String, _)| match self.tensors.get(&name).map(|e| e.dtype.as_str()) {
            // A quantized weight does not decide the type.
            Some("U8" | "I8") => true,
            dtype => dtype == Some("BF16"),
        };
        match dtype {
            BaseDtype::Auto if model.tensors().into_iter().all(is_bf16) => BaseDtype::Bf16,
            BaseDtype::Auto => BaseDtype::F32,
            given => given,
        }
    }

    /// Checks that the weights that are stored quantized have the quantization of `format`, if it
    /// has one. [`Self::check`] must have succeeded before.
    ///
    /// # Errors
    /// A weight is quantized to another type than `model.quantization`.
    pub fn check_format(&self, model: &ModelConfig, format: BaseFormat) -> Result<(), FieldError> {
        for module in model.linear_modules() {
            let stored = match (self.weight(&module), format.quantization) {
                (Ok(StoredWeight::FourBit(state)), Quantization::Int8) => state.quant_type.name(),
                (Ok(StoredWeight::FourBit(state)), Quantization::Nf4 { .. })
                    if state.quant_type == FourBitType::Fp4 =>
                {
                    state.quant_type.name()
                }
                (Ok(StoredWeight::Int8), Quantization::Nf4 { .. }) => "int8",
                _ => continue,
            };
            let message =
                format!("the base already stores {}.weight in {stored}; remove this key", module.name);
            return Err(FieldError::new("model.quantization", message));
        }
        Ok(())
    }

    /// Returns the entry of the tensor `name`, or an error if it does not exist.
    fn tensor(&self, name: &str) -> Result<&TensorEntry, SafetensorsError> {
        self.tensors.get(name).ok_or_else(|| {
            let base =
                self.files.first().and_then(|f| f.name().parent()).map(Path::to_owned).unwrap_or_default();
            SafetensorsError { name: base, message: format!("tensor {name} is missing") }
        })
    }

    /// Checks the shape of a tensor, and that its type is a supported float type.
    fn check_dense(&self, name: &str, shape: &[usize]) -> Result<(), SafetensorsError> {
        let entry = self.tensor(name)?;
        if entry.shape != shape {
            let actual = &entry.shape;
            return Err(self
                .fail(entry, format!("tensor {name} has shape {actual:?}; config.json requires {shape:?}")));
        }
        if !["F32", "BF16", "F16"].contains(&entry.dtype.as_str()) {
            return Err(
                self.fail(entry, format!("tensor {name} is {}; supported: F32, BF16, F16", entry.dtype))
            );
        }
        Ok(())
    }

    fn fail(&self, entry: &TensorEntry, message: String) -> SafetensorsError {
        SafetensorsError { name: self.files[entry.file].name().to_owned(), message }
    }
}

/// Whether the decoder's tensor `name` is one of `known`, describes a quantized weight of them, or
/// holds frequencies of rotary embeddings, which `config.json` has too.
fn is_expected(name: &str, known: &BTreeSet<&str>) -> bool {
    let of_int8 = [".SCB", ".weight_format"].iter().find_map(|end| name.strip_suffix(end));
    known.contains(name)
        || name.ends_with(".inv_freq")
        || of_int8.is_some_and(|module| known.contains(format!("{module}.weight").as_str()))
        || name.match_indices('.').any(|(end, _)| known.contains(&name[..end]))
}

fn shards(index: &SourceFile, dir: &SourceDir) -> Result<Vec<SourceFile>, SafetensorsError> {
    let fail = |message: String| SafetensorsError { name: index.name().to_owned(), message };
    let text = index.read_to_string().map_err(|e| fail(e.to_string()))?;
    let json: Value = serde_json::from_str(&text).map_err(|e| fail(e.to_string()))?;
    let map = json
        .get("weight_map")
        .and_then(Value::as_object)
        .ok_or_else(|| fail("weight_map is missing".into()))?;
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    if names.is_empty() {
        return Err(fail("weight_map does not list a file".into()));
    }
    for name in &names {
        if Path::new(name).components().count() != 1 || !dir.file(name).path().is_file() {
            return Err(fail(format!("weight_map names {name}, which is not in this directory")));
        }
    }
    Ok(names.into_iter().map(|name| dir.file(name)).collect())
}

/// Reads the tensors of a safetensors file, and checks that the file is as long as its header
/// requires.
fn read_header(
    source: &SourceFile,
    file_index: usize,
) -> Result<Vec<(String, TensorEntry)>, SafetensorsError> {
    let fail = |message: String| SafetensorsError { name: source.name().to_owned(), message };
    let io = |e: std::io::Error| fail(e.to_string());
    // A pipe would wait for its writer.
    let metadata = source.path().metadata().map_err(io)?;
    if !metadata.is_file() {
        return Err(fail("is not a file".into()));
    }
    let mut file = File::open(source.path()).map_err(io)?;
    let length = metadata.len();
    let truncated = || fail(format!("is truncated: {length} bytes do not hold a safetensors header"));
    let mut start = [0; 40];
    let is_pointer = file.read_exact(&mut start).is_ok() && is_git_lfs_pointer(&start);
    if is_pointer {
        return Err(fail(GIT_LFS_POINTER.to_owned()));
    }
    file.rewind().map_err(io)?;
    let mut size = [0; 8];
    file.read_exact(&mut size).map_err(|_| truncated())?;
    let size = u64::from_le_bytes(size);
    if size > MAX_HEADER_BYTES {
        return Err(fail(format!("is not a safetensors file: its header would have {size} bytes")));
    }
    if size + 8 > length {
        return Err(truncated());
    }
    let mut text = vec![0; size as usize];
    file.read_exact(&mut text).map_err(io)?;
    let json: Value =
        serde_json::from_slice(&text).map_err(|e| fail(format!("its header is not JSON: {e}")))?;
    let entries = json.as_object().ok_or_else(|| fail("its header is not a JSON object".into()))?;
    let mut tensors = Vec::new();
    let mut end = 0;
    for (name, entry) in entries.iter().filter(|(name, _)| *name != "__metadata__") {
        let parsed = entry
            .get("dtype")
            .and_then(Value::as_str)
            .zip(dimensions(entry, "shape"))
            .zip(dimensions(entry, "data_offsets"));
        let Some(((dtype, shape), offsets)) = parsed else {
            return Err(fail(format!(
                "its header describes tensor {name} without dtype, shape or data_offsets"
            )));
        };
        let (&[first, last], width) = (offsets.as_slice(), element_size(dtype)) else {
            return Err(fail(format!("data_offsets of tensor {name} are not two numbers")));
        };
        let elements = shape.iter().try_fold(1_usize, |n, d| n.checked_mul(*d));
        let expected = elements.zip(width).map(|(n, width)| n as u128 * width as u128);
        if first > last || expected.is_some_and(|expected| expected != (last - first) as u128) {
            return Err(fail(format!(
                "data_offsets {first}..{last} of tensor {name} do not match its type and shape, \
                 {dtype} {shape:?}"
            )));
        }
        end = end.max(last as u64);
        let start = 8 + size;
        let bytes = start + first as u64..start.saturating_add(last as u64);
        tensors.push((name.clone(), TensorEntry { file: file_index, dtype: dtype.to_owned(), shape, bytes }));
    }
    let expected = (8 + size).saturating_add(end);
    if length < expected {
        return Err(fail(format!("is truncated: {length} bytes of {expected}")));
    }
    if length > expected {
        return Err(fail(format!("has {} bytes after its last tensor", length - expected)));
    }
    Ok(tensors)
}

/// Returns the bytes of an element, for types that can be loaded.
fn element_size(dtype: &str) -> Option<usize> {
    match dtype {
        "F32" => Some(4),
        "BF16" | "F16" => Some(2),
        "U8" | "I8" => Some(1),
        _ => None,
    }
}

fn dimensions(entry: &Value, key: &str) -> Option<Vec<usize>> {
    entry.get(key)?.as_array()?.iter().map(|v| v.as_u64().map(|n| n as usize)).collect()
}

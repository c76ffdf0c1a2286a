use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::Columns;
use crate::cpu::{read_f32, update_f32};

pub(super) fn copy(source: &Tensor, target: &Tensor, Columns { width, from, to }: Columns) -> Result<()> {
    let (source_columns, target_columns) = (source.dims2()?.1, target.dims2()?.1);
    let target = &mut *update_f32(target, &[source])?;
    let source = &*read_f32(source)?;
    let rows = target.par_chunks_mut(target_columns).zip(source.par_chunks(source_columns));
    rows.with_min_len(8).for_each(|(target, source)| {
        target[to..to + width].copy_from_slice(&source[from..from + width]);
    });
    Ok(())
}

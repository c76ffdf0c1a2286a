//! Checks that compare every operation on the GPU with the same operation on the CPU.

use crate::check::Check;

mod adamw;
mod alignment;
mod attention;
mod columns;
mod cross_entropy;
mod dropout;
mod embedding;
mod glu;
mod linear;
mod norm;
mod pointwise;
mod profile;
mod quant;
mod random;
mod reduce;
mod rope;

/// The checks of all operations.
pub(crate) fn checks() -> Vec<Check> {
    [
        adamw::checks(),
        alignment::checks(),
        attention::checks(),
        columns::checks(),
        cross_entropy::checks(),
        dropout::checks(),
        embedding::checks(),
        glu::checks(),
        linear::checks(),
        norm::checks(),
        pointwise::checks(),
        profile::checks(),
        quant::checks(),
        random::checks(),
        reduce::checks(),
        rope::checks(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

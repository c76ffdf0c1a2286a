//! The blocks of a state in windows, which a GPU updates one after the other.

use std::ops::Range;

use candle_core::Result;

use super::{BLOCK, is_8bit};

/// The blocks that are updated at a time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct BlockWindow {
    pub(super) blocks: Range<usize>,
    /// The codes of these blocks.
    pub(super) codes: Range<usize>,
}

/// Returns a table and the windows. The table has three numbers for each block: its first
/// parameter, its first code, relative to the first code of its window, and its number of elements.
/// A window has at most `window` elements, but at least one block.
pub(super) fn block_windows(ranges: &[Range<usize>], window: usize) -> Result<(Vec<u32>, Vec<BlockWindow>)> {
    let most = (window / BLOCK).max(1);
    let mut table = Vec::new();
    let mut block_windows: Vec<BlockWindow> = Vec::new();
    let mut next = BlockWindow { blocks: 0..0, codes: 0..0 };
    for range in ranges.iter().filter(|range| is_8bit(range)) {
        for first in range.clone().step_by(BLOCK) {
            let len = BLOCK.min(range.end - first);
            for n in [first, next.codes.len(), len] {
                let Ok(n) = u32::try_from(n) else {
                    candle_core::bail!("8-bit AdamW: {n} parameters are too many")
                };
                table.push(n);
            }
            next.blocks.end += 1;
            next.codes.end += len;
            if next.blocks.len() == most {
                let after = BlockWindow {
                    blocks: next.blocks.end..next.blocks.end,
                    codes: next.codes.end..next.codes.end,
                };
                block_windows.push(std::mem::replace(&mut next, after));
            }
        }
    }
    if !next.blocks.is_empty() {
        block_windows.push(next);
    }
    Ok((table, block_windows))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tensors of 5000, 100, 4096 and 4097 elements: 20, 0, 16 and 17 blocks.
    const RANGES: [Range<usize>; 4] = [0..5000, 5000..5100, 5100..9196, 9196..13293];

    #[test]
    fn windows_are_contiguous_and_cover_every_block() {
        let (whole, one) = block_windows(&RANGES, usize::MAX).unwrap();
        assert_eq!(one, [BlockWindow { blocks: 0..53, codes: 0..13193 }]);
        assert_eq!(whole[19 * 3..22 * 3], [4864, 4864, 136, 5100, 5000, 256, 5356, 5256, 256]);
        for (window, count) in [(0, 53), (256, 53), (1000, 18), (53 * 256, 1), (1 << 22, 1)] {
            let (table, block_windows) = block_windows(&RANGES, window).unwrap();
            assert_eq!(block_windows.len(), count, "{window}");
            let (mut blocks, mut codes) = (0, 0);
            for part in block_windows {
                assert_eq!((part.blocks.start, part.codes.start), (blocks, codes));
                assert!(part.codes.len() <= window.max(BLOCK), "{part:?} of {window}");
                for block in part.blocks.clone() {
                    let (row, of_whole) = (&table[3 * block..][..3], &whole[3 * block..][..3]);
                    assert_eq!((row[0], row[2]), (of_whole[0], of_whole[2]));
                    assert_eq!(codes + row[1] as usize, of_whole[1] as usize);
                }
                (blocks, codes) = (part.blocks.end, part.codes.end);
            }
            assert_eq!((blocks, codes), (53, 13193));
        }
        assert_eq!(block_windows(&RANGES[..0], 256).unwrap(), (vec![], vec![]));
    }
}

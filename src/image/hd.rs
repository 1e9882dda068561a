//! Where the tokens of a Phi-3.5-vision picture lie on it: the geometry of its HD transform.
//!
//! The picture is resized to the width of a row of square crops and centred on a white page that
//! is a whole number of crops high (a tall picture is turned on its side for that, and back). The
//! page is cut into crops, and once more seen as a whole, squeezed into one crop. Its tokens
//! come in this order: the patches of all crops, a row of the whole page at a time, each row with
//! its end; a separator; the patches of the whole view with the ends of their rows.
//!
//! The sizes are those that mtmd computes (patch `mtmd-phi3v-image-processing`); here they say
//! where to draw.

/// How a vision file cuts pictures.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Cut {
    /// Pixels along a crop's side.
    pub side: u32,
    /// Tokens along a crop's side: merged patches.
    pub tokens: u32,
    /// Crops at most.
    pub max_crops: u32,
}

/// A picture's size, and how it is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Layout {
    /// In pixels.
    pub width: u32,
    /// In pixels.
    pub height: u32,
    /// The model's rule.
    pub cut: Cut,
}

/// A rectangle on the page, in its pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rect {
    /// Its left edge.
    pub x: f64,
    /// Its upper edge.
    pub y: f64,
    /// From left to right.
    pub width: f64,
    /// From top to bottom.
    pub height: f64,
}

/// Which of the two views of a picture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Cut into crops.
    Crops,
    /// The whole picture in one crop.
    Whole,
}

/// What a visual token is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Place {
    /// A part of the picture in this view.
    Patch(View, Rect),
    /// The end of a row of patches, drawn as a strip at the page's right edge.
    RowEnd(View, Rect),
    /// Between the two views.
    Separator,
}

/// The page, in pixels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Page {
    /// From left to right.
    pub width: u32,
    /// From top to bottom.
    pub height: u32,
    /// Where the picture lies on it.
    pub picture: Rect,
    /// Crops from top to bottom and from left to right.
    pub rows: u32,
    /// Crops from left to right.
    pub cols: u32,
}

impl Layout {
    /// `None` for sizes that no vision file has.
    pub fn page(&self) -> Option<Page> {
        let Layout { width, height, cut } = *self;
        let sound = (1..=4096).contains(&cut.side)
            && (1..=256).contains(&cut.tokens)
            && (1..=64).contains(&cut.max_crops);
        if !sound || width == 0 || height == 0 {
            return None;
        }
        let flip = width < height;
        let (long, short) = (f64::from(width.max(height)), f64::from(width.min(height)));
        let ratio = long / short;
        let mut cols = 1;
        while f64::from(cols + 1) * (f64::from(cols + 1) / ratio).ceil() <= f64::from(cut.max_crops)
        {
            cols += 1;
        }
        let wide = cols * cut.side;
        let high = (f64::from(wide) / ratio) as u32;
        let rows = high.div_ceil(cut.side);
        if rows == 0 {
            return None;
        }
        let padded = rows * cut.side;
        // Whole pixels, as the margins are.
        let top = f64::from((padded - high) / 2);
        let (wide, high) = (f64::from(wide), f64::from(high));
        Some(match flip {
            false => Page {
                width: cols * cut.side,
                height: padded,
                picture: Rect {
                    x: 0.0,
                    y: top,
                    width: wide,
                    height: high,
                },
                rows,
                cols,
            },
            true => Page {
                width: padded,
                height: cols * cut.side,
                picture: Rect {
                    x: top,
                    y: 0.0,
                    width: high,
                    height: wide,
                },
                rows: cols,
                cols: rows,
            },
        })
    }

    /// The place of every visual token, in order; nothing for sizes that no vision file has.
    pub fn places(&self) -> Vec<Place> {
        let Some(page) = self.page() else {
            return Vec::new();
        };
        let n = self.cut.tokens;
        let mut places = Vec::new();
        grid(
            &page,
            View::Crops,
            page.rows * n,
            page.cols * n,
            &mut places,
        );
        places.push(Place::Separator);
        grid(&page, View::Whole, n, n, &mut places);
        places
    }

    /// Which of a picture's `n` visual tokens show nothing: the ends of rows, and what stands
    /// between the views. Ascending; none where the picture was cut in another way.
    pub fn separators(&self, n: usize) -> Vec<u32> {
        let places = self.places();
        if places.len() != n {
            return Vec::new();
        }
        let numbered = (0..).zip(&places);
        numbered
            .filter(|(_, place)| !matches!(place, Place::Patch(..)))
            .map(|(row, _)| row)
            .collect()
    }
}

fn grid(page: &Page, view: View, rows: u32, cols: u32, places: &mut Vec<Place>) {
    let (page_width, page_height) = (f64::from(page.width), f64::from(page.height));
    let (width, height) = (page_width / f64::from(cols), page_height / f64::from(rows));
    for row in 0..rows {
        let y = f64::from(row) * height;
        let patch = |col: u32| Rect {
            x: f64::from(col) * width,
            y,
            width,
            height,
        };
        places.extend((0..cols).map(|col| Place::Patch(view, patch(col))));
        places.push(Place::RowEnd(
            view,
            Rect {
                x: page_width,
                y,
                width: width / 3.0,
                height,
            },
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(width: u32, height: u32) -> Layout {
        let cut = Cut {
            side: 168,
            tokens: 6,
            max_crops: 4,
        };
        Layout { width, height, cut }
    }

    #[test]
    fn a_tall_picture_has_its_margins_left_and_right() {
        let page = layout(200, 500).page().unwrap();
        assert_eq!((page.width, page.height), (168, 336));
        assert_eq!((page.rows, page.cols), (2, 1));
        let Rect { x, width, .. } = page.picture;
        assert_eq!((x, width), (17.0, 134.0));
    }

    #[test]
    fn rows_end_in_separators() {
        // 2x2 crops and the whole view, 6 tokens along a side: rows of 12 and of 6, and their ends.
        let square = layout(500, 500);
        let crops = (1..=12).map(|row| row * 13 - 1);
        let between = 12 * 13;
        let whole = (1..=6).map(|row| between + row * 7);
        let expected: Vec<u32> = crops.chain([between]).chain(whole).collect();
        assert_eq!(square.separators(199), expected);
        assert!(square.separators(198).is_empty(), "another layout");
    }

    #[test]
    fn sizes_that_cannot_be_have_no_places() {
        let mut bad = layout(10, 10);
        bad.cut.max_crops = 1000;
        assert_eq!(bad.places(), []);
        assert_eq!(layout(0, 10).places(), []);
        assert_eq!(layout(100_000, 1).places(), []);
        let mut flat = layout(10, 10);
        flat.cut.side = 0;
        assert_eq!(flat.page(), None);
    }
}

//! Charts as SVG. Colours are names that the page's style sheet knows, so that one drawing reads
//! in the light and in the dark.

use std::ops::Range;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::error::{Error, Result};

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// A colour of the style sheet: `--c<n>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ink(pub u8);

impl Ink {
    /// For text and lines of the frame.
    pub const TEXT: Ink = Ink(254);
    pub const GRID: Ink = Ink(255);

    /// What stands in the drawing until [`finished`] gives the colour its name.
    fn stand_in(self) -> RGBColor {
        RGBColor(1, 2, self.0)
    }
}

/// One line.
#[derive(Clone, Debug)]
pub struct Line {
    pub ink: Ink,
    pub points: Vec<(f64, f64)>,
    /// Fills the space down to the line before it, or to 0.
    pub filled: bool,
}

/// A measured point with the interval of its height, and a few letters beside it.
#[derive(Clone, Debug)]
pub struct Dot {
    pub ink: Ink,
    pub at: (f64, f64),
    pub interval: Option<(f64, f64)>,
    pub label: String,
}

/// What the axes say.
#[derive(Clone, Debug)]
pub struct Axes<'a> {
    pub x: &'a str,
    pub y: &'a str,
    pub x_range: Range<f64>,
    pub y_range: Range<f64>,
}

const SIZE: (u32, u32) = (720, 330);

fn drawn<E: std::error::Error + Send + Sync>(e: DrawingAreaErrorKind<E>) -> Error {
    Error::contract(format!("a chart: {e}"))
}

fn label(size: u32) -> TextStyle<'static> {
    let mut style = TextStyle::from(("sans-serif", size).into_font());
    style.color = Ink::TEXT.stand_in().to_backend_color();
    style
}

/// Lines over steps. Filled ones are stacked by whoever gives them.
///
/// # Errors
/// When the library refuses.
pub fn lines(axes: &Axes<'_>, lines: &[Line]) -> Result<String> {
    framed(axes, |chart| {
        for (i, line) in lines.iter().enumerate() {
            let color = line.ink.stand_in();
            if line.filled {
                let below = i.checked_sub(1).map(|below| &lines[below]);
                let below = below.filter(|below| below.filled);
                let mut outline = line.points.clone();
                match below {
                    Some(below) => outline.extend(below.points.iter().rev()),
                    None => outline.extend(
                        [line.points.last(), line.points.first()]
                            .into_iter()
                            .flatten()
                            .map(|&(x, _)| (x, 0.0)),
                    ),
                }
                let area = Polygon::new(outline, color.mix(0.35).filled());
                chart.draw_series([area]).map_err(drawn)?;
            }
            let stroke = color.stroke_width(2);
            let points = line.points.iter().copied();
            chart
                .draw_series(LineSeries::new(points, stroke))
                .map_err(drawn)?;
        }
        Ok(())
    })
}

/// Dots with their intervals; those of a group are joined, in order. `front` is drawn under them.
///
/// # Errors
/// When the library refuses.
pub fn dots(axes: &Axes<'_>, groups: &[Vec<Dot>], front: &[(f64, f64)]) -> Result<String> {
    framed(axes, |chart| {
        let grey = Ink::TEXT.stand_in().mix(0.45).stroke_width(1);
        let dashes = DashedLineSeries::new(front.iter().copied(), 5, 4, grey);
        chart.draw_series(dashes).map_err(drawn)?;
        for dots in groups {
            let Some(first) = dots.first() else { continue };
            let color = first.ink.stand_in();
            let points = dots.iter().map(|dot| dot.at);
            let thin = color.mix(0.6).stroke_width(1);
            chart
                .draw_series(LineSeries::new(points, thin))
                .map_err(drawn)?;
            for Dot {
                at: (x, y),
                interval,
                label: text,
                ..
            } in dots
            {
                if let Some((low, high)) = interval {
                    let bar = PathElement::new([(*x, *low), (*x, *high)], color.mix(0.4));
                    chart.draw_series([bar]).map_err(drawn)?;
                }
                let dot = Circle::new((*x, *y), 5, color.filled());
                chart.draw_series([dot]).map_err(drawn)?;
                let beside =
                    EmptyElement::at((*x, *y)) + Text::new(text.clone(), (8, -14), label(12));
                chart.draw_series([beside]).map_err(drawn)?;
            }
        }
        Ok(())
    })
}

/// Horizontal bars with their names on the left and their values at their ends.
///
/// # Errors
/// When the library refuses.
pub fn bars(rows: &[(String, Ink, f64, String)]) -> Result<String> {
    const ROW: i32 = 26;
    const LEFT: i32 = 190;
    const RIGHT: i32 = 90;
    let height = (rows.len() as i32 * ROW).max(ROW) as u32;
    let most = rows
        .iter()
        .map(|(_, _, value, _)| *value)
        .fold(0.0, f64::max);
    let width = SIZE.0 as i32 - LEFT - RIGHT;
    drawing((SIZE.0, height), |area| {
        for (i, (name, ink, value, shown)) in rows.iter().enumerate() {
            let y = i as i32 * ROW;
            let share = if most > 0.0 { value / most } else { 0.0 };
            let end = LEFT + (share.clamp(0.0, 1.0) * f64::from(width)) as i32;
            let bar = Rectangle::new(
                [(LEFT, y + 5), (end.max(LEFT + 1), y + ROW - 5)],
                ink.stand_in().mix(0.8).filled(),
            );
            area.draw(&bar).map_err(drawn)?;
            area.draw(&Text::new(name.clone(), (0, y + 6), label(14)))
                .map_err(drawn)?;
            area.draw(&Text::new(shown.clone(), (end + 6, y + 6), label(13)))
                .map_err(drawn)?;
        }
        Ok(())
    })
}

type Chart<'a, 'b> = ChartContext<
    'a,
    SVGBackend<'b>,
    Cartesian2d<plotters::coord::types::RangedCoordf64, plotters::coord::types::RangedCoordf64>,
>;

fn framed(axes: &Axes<'_>, draw: impl FnOnce(&mut Chart<'_, '_>) -> Result<()>) -> Result<String> {
    drawing(SIZE, |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(8)
            .margin_right(28)
            .x_label_area_size(44)
            .y_label_area_size(58)
            .build_cartesian_2d(axes.x_range.clone(), axes.y_range.clone())
            .map_err(drawn)?;
        let frame = Ink::TEXT.stand_in().mix(0.6);
        chart
            .configure_mesh()
            .x_desc(axes.x)
            .y_desc(axes.y)
            .x_labels(8)
            .y_labels(6)
            .x_label_formatter(&short)
            .y_label_formatter(&short)
            .axis_style(frame)
            .bold_line_style(Ink::GRID.stand_in())
            .light_line_style(TRANSPARENT)
            .label_style(label(13))
            .axis_desc_style(label(14))
            .draw()
            .map_err(drawn)?;
        draw(&mut chart)
    })
}

/// At most two digits behind the point, and none that say nothing.
fn short(value: &f64) -> String {
    let text = format!("{value:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    match text {
        "-0" => "0".into(),
        text => text.into(),
    }
}

fn drawing(size: (u32, u32), draw: impl FnOnce(&Area<'_>) -> Result<()>) -> Result<String> {
    let mut svg = String::new();
    {
        let area = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        draw(&area)?;
        area.present().map_err(drawn)?;
    }
    Ok(finished(&svg))
}

/// Gives the colours their names. Those that stand in for them occur nowhere else.
fn finished(svg: &str) -> String {
    let mut out = String::with_capacity(svg.len());
    let mut rest = svg;
    while let Some((before, after)) = rest.split_once("#0102") {
        out.push_str(before);
        let number = after
            .get(..2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match number.map(Ink) {
            Some(Ink::TEXT) => out.push_str("currentColor"),
            Some(Ink::GRID) => out.push_str("var(--grid)"),
            Some(Ink(n)) => out.push_str(&format!("var(--c{n})")),
            None => out.push_str("#0102"),
        }
        rest = after.get(2..).unwrap_or("");
    }
    out.push_str(rest);
    out.replacen("<svg ", "<svg class=\"chart\" role=\"img\" ", 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_the_style_sheets() {
        let line = Line {
            ink: Ink(3),
            points: vec![(0.0, 1.0), (1.0, 2.0)],
            filled: true,
        };
        let axes = Axes {
            x: "a < b",
            y: "cells",
            x_range: 0.0..1.0,
            y_range: 0.0..2.0,
        };
        let svg = lines(&axes, &[line]).unwrap();
        assert!(svg.contains("var(--c3)") && svg.contains("currentColor"));
        assert!(!svg.contains("#0102"), "{svg}");
        assert!(svg.contains("a &lt; b"), "{svg}");
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!(
            [0.0, 0.5, 20.0, 1.25].map(|x| short(&x)),
            ["0", "0.5", "20", "1.25"]
        );
    }
}

//! Converts values of Arrow arrays to JSON. The same table has the same rows in Parquet.

use arrow_array::cast::AsArray;
use arrow_array::types::{
    ArrowPrimitiveType, Date32Type, Date64Type, Decimal32Type, Decimal64Type, Decimal128Type, Decimal256Type,
    DurationMicrosecondType, DurationMillisecondType, DurationNanosecondType, DurationSecondType,
    Float16Type, Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, Time32MillisecondType,
    Time32SecondType, Time64MicrosecondType, Time64NanosecondType, TimestampMicrosecondType,
    TimestampMillisecondType, TimestampNanosecondType, TimestampSecondType, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, RecordBatch};
use arrow_schema::{DataType, Field, FieldRef, TimeUnit};
use parquet::data_type::{ByteArray, Decimal};
use parquet::record::Field as ParquetField;
use serde_json::{Map, Value as Json};

use crate::parquet_rows::{bytes_text, field_json, map_key};

/// Milliseconds from the epoch of the years 1 to 9999, which have a text.
const TEXT_YEARS: std::ops::RangeInclusive<i64> = -62_135_596_800_000..=253_402_300_799_999;

const MILLIS_PER_DAY: i64 = 86_400_000;

/// Checks that the values of a column can be converted.
///
/// # Errors
/// An error with the name of the column and the unsupported type.
pub(crate) fn check_type(column: &Field) -> Result<(), String> {
    match unsupported_type(column.data_type()) {
        None => Ok(()),
        Some(unsupported) => Err(format!(
            "its column {:?} has the type {unsupported}, which is not supported; remove the column",
            column.name()
        )),
    }
}

fn unsupported_type(data_type: &DataType) -> Option<&DataType> {
    match data_type {
        DataType::Union(..) | DataType::RunEndEncoded(..) | DataType::Interval(_) => Some(data_type),
        // The library that formats decimals supports no others.
        DataType::Decimal32(precision, scale)
        | DataType::Decimal64(precision, scale)
        | DataType::Decimal128(precision, scale)
        | DataType::Decimal256(precision, scale) => {
            let is_supported = u8::try_from(*scale).is_ok_and(|scale| scale <= *precision);
            (!is_supported).then_some(data_type)
        }
        DataType::Dictionary(_, value) => unsupported_type(value),
        DataType::Struct(fields) => fields.iter().find_map(|field| unsupported_type(field.data_type())),
        DataType::List(element)
        | DataType::LargeList(element)
        | DataType::ListView(element)
        | DataType::LargeListView(element)
        | DataType::FixedSizeList(element, _)
        | DataType::Map(element, _) => unsupported_type(element.data_type()),
        _ => None,
    }
}

/// Returns row `i` of a batch. Nulls are omitted.
///
/// # Errors
/// A value that has no form in JSON.
pub(crate) fn row_object(batch: &RecordBatch, i: usize) -> Result<Map<String, Json>, String> {
    object(batch.schema_ref().fields(), batch.columns(), i)
}

fn object(
    fields: &[FieldRef],
    columns: &[arrow_array::ArrayRef],
    i: usize,
) -> Result<Map<String, Json>, String> {
    let mut object = Map::new();
    for (field, column) in fields.iter().zip(columns) {
        let value = value(column, i)?;
        if !value.is_null() {
            object.insert(field.name().clone(), value);
        }
    }
    Ok(object)
}

fn elements(array: &dyn Array, elements: impl ExactSizeIterator<Item = usize>) -> Result<Json, String> {
    elements.map(|i| value(array, i)).collect::<Result<_, _>>().map(Json::Array)
}

fn value(array: &dyn Array, i: usize) -> Result<Json, String> {
    if array.is_null(i) {
        return Ok(Json::Null);
    }
    let leaf = |field: ParquetField| field_json(&field);
    match array.data_type() {
        DataType::Null => Ok(Json::Null),
        DataType::Boolean => Ok(array.as_boolean().value(i).into()),
        DataType::Int8 => Ok(primitive::<Int8Type>(array, i).into()),
        DataType::Int16 => Ok(primitive::<Int16Type>(array, i).into()),
        DataType::Int32 => Ok(primitive::<Int32Type>(array, i).into()),
        DataType::Int64 => Ok(primitive::<Int64Type>(array, i).into()),
        DataType::UInt8 => Ok(primitive::<UInt8Type>(array, i).into()),
        DataType::UInt16 => Ok(primitive::<UInt16Type>(array, i).into()),
        DataType::UInt32 => Ok(primitive::<UInt32Type>(array, i).into()),
        DataType::UInt64 => Ok(primitive::<UInt64Type>(array, i).into()),
        DataType::Float16 => leaf(ParquetField::Float16(primitive::<Float16Type>(array, i))),
        DataType::Float32 => leaf(ParquetField::Float(primitive::<Float32Type>(array, i))),
        DataType::Float64 => leaf(ParquetField::Double(primitive::<Float64Type>(array, i))),
        DataType::Utf8 => Ok(array.as_string::<i32>().value(i).into()),
        DataType::LargeUtf8 => Ok(array.as_string::<i64>().value(i).into()),
        DataType::Utf8View => Ok(array.as_string_view().value(i).into()),
        DataType::Binary => bytes_text(array.as_binary::<i32>().value(i)),
        DataType::LargeBinary => bytes_text(array.as_binary::<i64>().value(i)),
        DataType::BinaryView => bytes_text(array.as_binary_view().value(i)),
        DataType::FixedSizeBinary(_) => bytes_text(array.as_fixed_size_binary().value(i)),
        DataType::Dictionary(key_type, _) => match dictionary_key(array, key_type, i) {
            Some(key) => value(array.as_any_dictionary().values(), key),
            None => Err("a value of a dictionary has no key".into()),
        },
        DataType::Struct(fields) => Ok(Json::Object(object(fields, array.as_struct().columns(), i)?)),
        DataType::List(_) => {
            let list = array.as_list::<i32>();
            let offsets = list.value_offsets();
            elements(list.values(), offsets[i] as usize..offsets[i + 1] as usize)
        }
        DataType::LargeList(_) => {
            let list = array.as_list::<i64>();
            let offsets = list.value_offsets();
            elements(list.values(), offsets[i] as usize..offsets[i + 1] as usize)
        }
        DataType::ListView(_) => {
            let list = array.as_list_view::<i32>();
            let start = list.value_offset(i) as usize;
            elements(list.values(), start..start + list.value_size(i) as usize)
        }
        DataType::LargeListView(_) => {
            let list = array.as_list_view::<i64>();
            let start = list.value_offset(i) as usize;
            elements(list.values(), start..start + list.value_size(i) as usize)
        }
        DataType::FixedSizeList(_, size) => {
            let list = array.as_fixed_size_list();
            let start = list.value_offset_at(i);
            elements(list.values(), start..start + *size as usize)
        }
        DataType::Map(..) => {
            let map = array.as_map();
            let offsets = map.value_offsets();
            let mut object = Map::new();
            for entry in offsets[i] as usize..offsets[i + 1] as usize {
                object.insert(map_key(value(map.keys(), entry)?), value(map.values(), entry)?);
            }
            Ok(Json::Object(object))
        }
        DataType::Decimal32(precision, scale) => {
            decimal(&i128::from(primitive::<Decimal32Type>(array, i)).to_be_bytes(), *precision, *scale)
        }
        DataType::Decimal64(precision, scale) => {
            decimal(&i128::from(primitive::<Decimal64Type>(array, i)).to_be_bytes(), *precision, *scale)
        }
        DataType::Decimal128(precision, scale) => {
            decimal(&primitive::<Decimal128Type>(array, i).to_be_bytes(), *precision, *scale)
        }
        DataType::Decimal256(precision, scale) => {
            decimal(&primitive::<Decimal256Type>(array, i).to_be_bytes(), *precision, *scale)
        }
        DataType::Date32 => date(i64::from(primitive::<Date32Type>(array, i))),
        DataType::Date64 => date(primitive::<Date64Type>(array, i).div_euclid(MILLIS_PER_DAY)),
        DataType::Time32(TimeUnit::Second) => {
            leaf(ParquetField::TimeMillis(primitive::<Time32SecondType>(array, i).wrapping_mul(1000)))
        }
        DataType::Time32(_) => leaf(ParquetField::TimeMillis(primitive::<Time32MillisecondType>(array, i))),
        DataType::Time64(TimeUnit::Microsecond) => {
            leaf(ParquetField::TimeMicros(primitive::<Time64MicrosecondType>(array, i)))
        }
        DataType::Time64(_) => Ok(primitive::<Time64NanosecondType>(array, i).into()),
        DataType::Timestamp(TimeUnit::Second, _) => {
            let millis = primitive::<TimestampSecondType>(array, i).saturating_mul(1000);
            timestamp(millis, ParquetField::TimestampMillis(millis))
        }
        DataType::Timestamp(TimeUnit::Millisecond, _) => {
            let millis = primitive::<TimestampMillisecondType>(array, i);
            timestamp(millis, ParquetField::TimestampMillis(millis))
        }
        DataType::Timestamp(TimeUnit::Microsecond, _) => {
            let micros = primitive::<TimestampMicrosecondType>(array, i);
            timestamp(micros.div_euclid(1000), ParquetField::TimestampMicros(micros))
        }
        DataType::Timestamp(TimeUnit::Nanosecond, _) => {
            Ok(primitive::<TimestampNanosecondType>(array, i).into())
        }
        DataType::Duration(unit) => Ok(match unit {
            TimeUnit::Second => primitive::<DurationSecondType>(array, i),
            TimeUnit::Millisecond => primitive::<DurationMillisecondType>(array, i),
            TimeUnit::Microsecond => primitive::<DurationMicrosecondType>(array, i),
            TimeUnit::Nanosecond => primitive::<DurationNanosecondType>(array, i),
        }
        .into()),
        other => Err(format!("a value has the unsupported type {other}")),
    }
}

fn primitive<T: ArrowPrimitiveType>(array: &dyn Array, i: usize) -> T::Native {
    array.as_primitive::<T>().value(i)
}

/// The place of a value in its dictionary.
fn dictionary_key(array: &dyn Array, key_type: &DataType, i: usize) -> Option<usize> {
    match key_type {
        DataType::Int8 => array.as_dictionary::<Int8Type>().key(i),
        DataType::Int16 => array.as_dictionary::<Int16Type>().key(i),
        DataType::Int32 => array.as_dictionary::<Int32Type>().key(i),
        DataType::Int64 => array.as_dictionary::<Int64Type>().key(i),
        DataType::UInt8 => array.as_dictionary::<UInt8Type>().key(i),
        DataType::UInt16 => array.as_dictionary::<UInt16Type>().key(i),
        DataType::UInt32 => array.as_dictionary::<UInt32Type>().key(i),
        DataType::UInt64 => array.as_dictionary::<UInt64Type>().key(i),
        _ => None,
    }
}

fn decimal(bytes: &[u8], precision: u8, scale: i8) -> Result<Json, String> {
    let bytes = ByteArray::from(bytes.to_vec());
    field_json(&ParquetField::Decimal(Decimal::from_bytes(bytes, precision.into(), scale.into())))
}

fn date(days: i64) -> Result<Json, String> {
    match i32::try_from(days).ok().filter(|_| TEXT_YEARS.contains(&days.saturating_mul(MILLIS_PER_DAY))) {
        Some(days) => field_json(&ParquetField::Date(days)),
        None => Err("a date is not in the years 1 to 9999".into()),
    }
}

fn timestamp(millis: i64, field: ParquetField) -> Result<Json, String> {
    match TEXT_YEARS.contains(&millis) {
        true => field_json(&field),
        false => Err("a timestamp is not in the years 1 to 9999".into()),
    }
}
